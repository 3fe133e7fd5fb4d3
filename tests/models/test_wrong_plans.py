"""What is wrong with a plan is said with the name of the module and what to do: before anything is changed, where it can
be seen then, else in the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from one_device import batch, line, plain
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.models.architectures import architecture_of
from shardgrad.testing import distributed

Change = Callable[[dict[str, str]], object]


class Doubling(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 2


def without(*ends: str) -> Change:
    def change(plan: dict[str, str]) -> None:
        for name in [name for name in plan if name.endswith(ends)]:
            del plan[name]

    return change


def instead(end: str, text: str) -> Change:
    def change(plan: dict[str, str]) -> None:
        (name,) = [name for name in plan if name.endswith(end)]
        plan[name] = text

    return change


def beside(name: str, text: str) -> Change:
    return lambda plan: plan.update({name: text})


def known_plan(model: Any, *changes: Change) -> dict[str, Any]:
    """The arguments of a plan that is known, changed."""
    known = architecture_of(model)
    assert known is not None
    texts = dict(known.plan)
    for change in changes:
        change(texts)
    return {"plan": texts, "sizes": known.sizes}


def state_of(model: nn.Module) -> list[Any]:
    """What may not change: modules and their classes, parameters, hooks, integers."""
    found: list[Any] = [(name, id(p), p.shape) for name, p in model.named_parameters(remove_duplicate=False)]
    for name, module in model.named_modules(remove_duplicate=False):
        integers = {key: value for key, value in vars(module).items() if isinstance(value, int)}
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.append((name, id(module), type(module), integers, hooks))
    return found


def refused(model: Any, match: str, kind: type[Exception] = sg.LayoutError, **arguments: Any) -> None:
    """Raised by `parallelize`, which has changed nothing."""
    before = state_of(model)
    mesh = arguments.pop("mesh", None) or init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with pytest.raises(kind, match=match):
        sg.parallelize(model, mesh, **arguments)
    assert state_of(model) == before


BEFORE: dict[str, tuple[str, dict[str, Any], Change, str]] = {
    "column as row": ("llama", {}, instead("up_proj", "f/tp -> d"), r"XX"),
    "head order": ("llama", {}, instead("q_proj", "d -> k,h/tp"), r"XX"),
    "tied head without the embedding": ("llama", {"tie_word_embeddings": True}, without("embed_tokens"), r"XX"),
    "tied embedding without the head": ("llama", {"tie_word_embeddings": True}, without("lm_head"), r"XX"),
    "tied, stored in two ways": (
        "llama", {"tie_word_embeddings": True}, instead("embed_tokens", "v -> d/tp"), r"XX",
    ),
    "means nothing": ("llama", {}, beside("model.layers.*.mlp.up_prj", "d -> f/tp"), r"XX"),
    "means one twice": ("llama", {}, beside("model.layers.0.mlp.up_proj", "d -> f/tp"), r"XX"),
    "no arrow": ("llama", {}, instead("up_proj", "d => f/tp"), r"XX"),
    "both sides": ("llama", {}, instead("up_proj", "d/tp -> f/tp"), r"XX"),
    "letter on both sides": ("llama", {}, instead("up_proj", "d -> d/tp"), r"XX"),
    "marks a sum": ("llama", {}, instead("down_proj", "f/tp -> d{tp}"), r"XX"),
    "not a text": ("llama", {}, instead("up_proj", 5), r"XX"),  # type: ignore[arg-type]
    "unknown axis": ("llama", {}, instead("up_proj", "d -> f/xx"), r"XX"),
    "size": ("llama", {}, instead("q_proj", "d -> h/tp,j"), r"XX"),
    "norm that is replicated": ("llama", {}, beside("**.input_layernorm", "d"), r"XX"),
    "integer where a module is": ("llama", {}, instead("q_proj", "h/tp,k"), r"XX"),
    "not a layer": ("llama", {}, beside("**.layers.*.mlp", "d -> f/tp"), r"XX"),
    "embedding replicated": ("llama", {}, instead("embed_tokens", "v -> d"), r"XX"),
    "flat fused": ("gpt2", {}, instead("c_attn", "d -> m/tp"), r"XX"),
    "fused does not add up": ("phi3", {}, instead("qkv_proj", "d -> h/tp,k + g/tp,k"), r"XX"),
    "one of two experts' weights": ("mixtral", {}, without("experts.down_proj"), r"XX"),
    "experts the wrong way": ("mixtral", {}, instead("experts.gate_up_proj", "d/tp -> c,f"), r"XX"),
}  # fmt: skip


@distributed(world_size=2)
def test_refused_before_anything_is_changed(world_size: int) -> None:
    out = []
    for name, (kind, changes, change, match) in BEFORE.items():
        model = plain(kind, (4, 2) if kind in ("llama", "mixtral", "phi3") else (4, 4), **changes)
        try:
            refused(model, match, **known_plan(model, change))
            out.append(name + ": OK")
        except BaseException as e:
            out.append(name + ": " + repr(e)[:900])
    raise RuntimeError("\n".join(out))


CALL: dict[str, tuple[str, Change, str]] = {
    "no o": ("llama", without("o_proj"), r"XX"),
    "no down": ("llama", without("down_proj"), r"XX"),
    "no q": ("llama", without("q_proj"), r"XX"),
    "no k": ("llama", without("k_proj"), r"XX"),
    "no v": ("llama", without("v_proj"), r"XX"),
    "no up": ("llama", without("up_proj"), r"XX"),
    "no gate": ("llama", without("gate_proj"), r"XX"),
    "o by columns": ("llama", instead("o_proj", "d -> h/tp,k"), r"XX"),
    "k sharded": ("llama", instead("q_proj", "d -> h,k/tp"), r"XX"),
    "embedding by features": ("llama", instead("embed_tokens", "v -> d/tp"), r"XX"),
    "gpt2's integer": ("gpt2", without("split_size"), r"XX"),
    "gpt2's parts swapped": ("gpt2", instead("c_attn", "d -> h/tp,c,k"), r"XX"),
    "opt's integer": ("opt", without("num_heads"), r"XX"),
    "phi3's integer": ("phi3", without("num_key_value_heads"), r"XX"),
    "no norm of olmo2": ("olmo2", without("q_norm"), r"XX"),
    "t5's bias of positions": ("t5", without("relative_attention_bias"), r"XX"),
    "gathered vocabulary": ("llama", instead("lm_head", "d -> v/tp -> v"), r"XX"),
}


@distributed(world_size=2)
def test_refused_in_the_first_call(world_size: int) -> None:
    out = []
    for name, (kind, change, match) in CALL.items():
        model = plain(kind, (4, 2) if kind in ("llama", "mixtral", "phi3", "olmo2") else (4, 4))
        try:
            sg.parallelize(model, line(2), **known_plan(model, change))
            with pytest.raises(sg.LayoutError, match=match):
                model(**batch(kind)).loss.backward()
            out.append(name + ": OK")
        except BaseException as e:
            out.append(name + ": " + repr(e)[:900])
    raise RuntimeError("\n".join(out))
