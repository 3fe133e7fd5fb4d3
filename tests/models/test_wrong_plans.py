"""What is wrong with a plan is said with the name of the module and what to do: before anything is changed, where it
can be seen then, else in the first call."""

from __future__ import annotations

import re
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


OTHERS = {"mixtral": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "t5": ("wi_0", "wi_1")}  # of other models


def known_plan(model: Any, *changes: Change) -> dict[str, Any]:
    """The arguments of a plan that is known, changed."""
    known = architecture_of(model)
    assert known is not None
    texts = dict(known.plan)
    others = [name for name in texts if name.endswith(OTHERS.get(model.config.model_type, ()))]
    for change in (*changes, *map(without, others)):
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


TIED = {"tie_word_embeddings": True}
BEFORE: dict[str, tuple[str, dict[str, Any], Change, str]] = {
    "column as row": (
        "llama", {}, instead("up_proj", "f/tp -> d"),
        r"layers.0.mlp.up_proj is stored as d -> f/tp by this architecture's own program, not as f/tp -> d",
    ),
    "head order": (
        "llama", {}, instead("q_proj", "d -> k,h/tp"), r"layers.0.self_attn.q_proj is stored as d -> h/tp,k .* not",
    ),
    "parts of heads": (
        "llama", {}, instead("q_proj", "d -> h,k/tp"), r"layers.0.self_attn.q_proj is stored as d -> h/tp,k .* not",
    ),
    "row with its output sharded": (
        "llama", {}, instead("o_proj", "d -> h/tp,k"), r"layers.0.self_attn.o_proj: its output has 28 features, which",
    ),
    "tied head without the embedding": (
        "llama", TIED, without("embed_tokens"),
        r"lm_head.weight and model.embed_tokens.weight are one parameter, .*: give both an entry, or neither",
    ),
    "tied embedding without the head": (
        "llama", TIED, without("lm_head"),
        r"embed_tokens.weight and lm_head.weight are one parameter, .*: give both an entry, or neither",
    ),
    "tied, stored in two ways": (
        "llama", TIED, instead("embed_tokens", "v -> d/tp"),
        r"embed_tokens.weight and lm_head.weight are one .* stores as W\[v,d/tp\] and as W\[v/tp,d\]",
    ),
    "means nothing": (
        "llama", {}, beside("model.layers.*.mlp.up_prj", "d -> f/tp"),
        r"'model.layers.\*.mlp.up_prj' of the plan means no module, .* \(a module is called …'up_proj'\)",
    ),
    "means one twice": (
        "llama", {}, beside("model.layers.0.mlp.up_proj", "d -> f/tp"),
        r"layers.0.mlp.up_proj is meant by '\*\*.layers.\*.mlp.up_proj' and .*: one entry for each module",
    ),
    "no arrow": (
        "llama", {}, instead("up_proj", "d => f/tp"),
        r"mlp.up_proj: cannot read 'd => f/tp' of .*\na plan's text reads like  d -> f/tp  or",
    ),
    "too many arrows": ("llama", {}, instead("up_proj", "d -> f -> f/tp -> f"), r"up_proj: .* is not of the form 'in"),
    "gathers other letters": ("llama", {}, instead("lm_head", "d -> v/tp -> w"), r"lm_head: .* letters without axes"),
    "both sides": (
        "llama", {}, instead("up_proj", "d/tp -> f/tp"), r"'d/tp -> f/tp' has tp on both sides: an axis",
    ),
    "letter on both sides": (
        "llama", {}, instead("up_proj", "d -> d/tp"), r"mlp.up_proj: 'd -> d/tp' has d on both sides of the arrow",
    ),
    "marks a sum": ("llama", {}, instead("down_proj", "f/tp -> d{tp}"), r"down_proj: cannot read 'd\{tp\}' of"),
    "not a text": (
        "llama", {}, instead("up_proj", 5), r"up_proj: a plan holds texts such as 'd -> h/tp,k', not int",  # type: ignore[arg-type]
    ),
    "unknown letters": (
        "llama", {}, instead("q_proj", "d -> i/tp,j"), r"q_proj: its output has 16 features, .* give sizes=\{'i': …\}",
    ),
    "norm that is replicated": (
        "llama", {}, beside("**.input_layernorm", "d"), r"input_layernorm: d shards none of its.*: leave it out",
    ),
    "norm of what is replicated": (
        "llama", {}, beside("**.layers.*.mlp.act_fn", "f/tp"), r"layers.0.mlp.act_fn is a SiLU.*: f/tp is of a norm",
    ),
    "no arrow where a layer is": ("llama", {}, instead("q_proj", "h/tp,k"), r"q_proj is a Linear .*: h/tp,k is"),
    "not a layer": (
        "llama", {}, beside("**.layers.*.mlp", "d -> f/tp"),
        r"layers.0.mlp is a LlamaMLP: a plan shards nn.Linear, .* Leave it out of the plan, or name what is in it",
    ),
    "embedding replicated": (
        "llama", {}, instead("embed_tokens", "v -> d"), r"embed_tokens is an embedding: 'v/tp -> d' or",
    ),
    "flat fused": ("gpt2", {}, instead("c_attn", "d -> m/tp"), r"c_attn is stored as d -> c,h/tp,k .* not as d -> m"),
    "parts swapped": (
        "gpt2", {}, instead("c_attn", "d -> h/tp,c,k"), r"attn.c_attn is stored as d -> c,h/tp,k .* as d -> h/tp,c",
    ),
    "fused does not add up": (
        "phi3", {}, instead("qkv_proj", "d -> h/tp,k + g/tp,k"), r"its output has 32 .*, but .* makes 24",
    ),
    "one of two experts' weights": (
        "mixtral", {}, without("experts.down_proj"),
        r"layers.0.mlp.experts has gate_up_proj and down_proj: the plan says how gate_up_proj is stored only",
    ),
    "experts the wrong way": (
        "mixtral", {}, instead("experts.gate_up_proj", "d/tp -> c,f"),
        r"layers.0.mlp.experts: experts are stored as gate_up_proj 'd -> c,f/tp' and down_proj 'f/tp -> d', not",
    ),
    "integer of heads": (
        "opt", {}, without("num_heads"),
        r"layers.0.self_attn.num_heads counts features of .*k_proj, which are .*: the plan lacks it, as 'h/tp'",
    ),
    "integer of KV heads": (
        "phi3", {}, without("num_key_value_heads"),
        r"layers.0.self_attn.num_key_value_heads counts features of .*_proj.*: the plan lacks it, as 'g/tp'",
    ),
    "integer of a configuration": (
        "phi3", {}, without("num_attention_heads"),
        r"self_attn.config.num_attention_heads counts features of .*_proj.*: the plan lacks it, as 'h/tp'",
    ),
    "integer of features": (
        "gpt2", {}, without("split_size"), r"attn.split_size counts .*c_attn.*: the plan lacks it, as 'h/tp,k'",
    ),
    "norm that is not known": (
        "gemma2", {}, beside("**.layers.*.input_layernorm", "d/tp"), r"input_layernorm is a Gemma2RMSNorm: of",
    ),
}  # fmt: skip
GROUPED = ("llama", "mixtral", "phi3", "olmo2", "gemma2")


def small(kind: str, **changes: Any) -> Any:
    return plain(kind, (4, 2) if kind in GROUPED else (4, 4), **changes)


@distributed(world_size=2)
def test_refused_before_anything_is_changed(world_size: int) -> None:
    for name, (kind, changes, change, match) in BEFORE.items():
        model = small(kind, **changes)
        try:
            refused(model, match, **known_plan(model, change))
        except BaseException as error:
            error.add_note(f"(of {name!r})")
            raise


@distributed(world_size=2)
def test_refused_of_other_reasons(world_size: int) -> None:
    model = small("llama")
    known = known_plan(model)
    refused(
        model, r"q_proj: its output has 16 features, which h/tp,k with h=4, k=7", **{**known, "sizes": {"h": 4, "k": 7}}
    )
    refused(model, r"g=3 KV heads do not divide h=4 query heads", **{**known, "sizes": {"h": 4, "k": 4, "g": 3}})
    refused(model, "the mesh has no axis 'xx'", sg.MeshError, **known_plan(model, instead("up_proj", "d -> f/xx")))
    refused(model, "no axis 'model'.* it has tp=2", sg.MeshError, axis="model")
    refused(model, "data: accumulate=True is for models of shardgrad", data=sg.BatchAxis("tp", accumulate=True))
    refused(nn.Sequential(nn.Linear(2, 2)), r"no plan is known for Sequential; known are bert")
    refused(nn.Sequential(nn.Linear(2, 2)), r"the plan means nothing of this Sequential", plan={})
    with pytest.raises(TypeError, match="model is a module, not dict"):
        sg.parallelize({}, line(2))  # type: ignore[type-var]
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Doubling
    refused(model, r"mlp.up_proj is a Doubling \(a subclass of nn.Linear\): .* a subclass may compute something else")
    table = small("llama")
    table.model.embed_tokens.max_norm = 1.0
    refused(table, r"embed_tokens sets max_norm, which no sharded embedding has: leave it out of the plan")
    spread = small("llama")
    spread.hf_device_map = {"": 0}
    refused(spread, "spread over devices by device_map")
    twice = sg.parallelize(small("llama"), line(2))
    refused(twice, r"has shardgrad layers already: parallelize a model once")


@distributed(world_size=2)
def test_dropout(world_size: int) -> None:
    """Refused where it is active; a model in evaluation mode has none until it is trained."""
    refused(
        small("gpt2", resid_pdrop=0.1), r"h.0.attn.resid_dropout drops elements with probability 0.1: .* to 0 \(in its"
    )
    refused(small("llama", attention_dropout=0.2), r"self_attn.attention_dropout drops elements with probability 0.2")
    for kind, changes, match in (
        ("llama", {"attention_dropout": 0.1}, r"layers.0.self_attn drops elements with probability 0.1"),
        ("gpt2", {"embd_pdrop": 0.1}, r"transformer.drop drops elements with probability 0.1"),
    ):
        model = sg.parallelize(small(kind, **changes).eval(), line(2))
        model(**batch(kind))
        model.train()
        with pytest.raises(sg.LayoutError, match=match):
            model(**batch(kind))


MIXED = "of a tensor that is replicated over tp, .* one that is sharded: .* a layer too many or one too few"
CALL: dict[str, tuple[str, Change, str]] = {
    "no o": (
        "llama", without("o_proj"),
        r"layers.0.self_attn.o_proj gets x sharded over tp, \(2, 7, 8\), but takes 16 .*: the plan lacks it",
    ),
    "no down": ("llama", without("down_proj"), r"layers.0.mlp.down_proj gets x sharded over tp.*: the plan lacks it"),
    "no fc2": ("opt", without("fc2"), r"layers.0.fc2 gets x sharded over tp, .*: the plan lacks it, as '…/tp -> d'"),
    "no q": ("llama", without("q_proj"), rf"layers.0.self_attn: scaled_dot_product_attention {MIXED}"),
    "no k": ("llama", without("k_proj"), rf"layers.0.self_attn: scaled_dot_product_attention {MIXED}"),
    "no v": ("llama", without("v_proj"), rf"layers.0.self_attn: scaled_dot_product_attention {MIXED}"),
    "no up": ("llama", without("up_proj"), rf"layers.0.mlp: mul {MIXED}"),
    "no gate": ("llama", without("gate_proj"), rf"layers.0.mlp: mul {MIXED}"),
    "no fc1": (
        "opt", without("fc1"),
        r"f/tp -> d gets x whole, \(14, \d+\), not this rank's \d+ features: the plan lacks the layer before it",
    ),
    "no q, k, v": (
        "llama", without("q_proj", "k_proj", "v_proj"), r"h/tp,k -> d gets x whole, .* as 'd -> …/tp'",
    ),
}  # fmt: skip


@distributed(world_size=2)
def test_refused_in_the_first_call(world_size: int) -> None:
    for name, (kind, change, match) in CALL.items():
        model = small(kind)
        sg.parallelize(model, line(2), **known_plan(model, change))
        for _ in range(2):  # in the second one again
            try:
                with pytest.raises(sg.LayoutError, match=match):
                    model(**batch(kind))
            except BaseException as error:
                error.add_note(f"(of {name!r})")
                raise


NOTED: dict[str, tuple[str, Change, str]] = {
    "norm of olmo2": ("olmo2", without("q_norm"), r"in model.layers.0.self_attn.q_norm of a model that sg.parallelize"),
    "t5's bias of positions": ("t5", without("relative_attention_bias"), r"SelfAttention of a model that sg"),
    "embedding by features": ("llama", instead("embed_tokens", "v -> d/tp"), r"in model.layers.0.input_layernorm of a"),
}


@distributed(world_size=2)
def test_what_the_program_itself_raises_is_noted(world_size: int) -> None:
    """Shapes that do not fit: with the module."""
    for name, (kind, change, match) in NOTED.items():
        model = small(kind)
        sg.parallelize(model, line(2), **known_plan(model, change))
        with pytest.raises((RuntimeError, ValueError)) as error:
            model(**batch(kind))
        notes = "\n".join(getattr(error.value, "__notes__", ()))
        assert re.search(match, notes), f"{name}: {notes!r}"
