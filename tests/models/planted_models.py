"""Bugs of tensor parallelism, planted into parallelized models of transformers: where each is found, and its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from verified import VOCAB

import shardgrad as sg
from shardgrad.comm.adjoint import gather_replicated
from shardgrad.nn.heads import Heads

Plant = Callable[[Any, DeviceMesh], "AbstractContextManager[Any] | None"]


@dataclass(frozen=True)
class Bug:
    """A bug.

    plant: changes the parallel model, or gives what is to be patched while it is verified.
    first: kind and the end of the name of the first tensor that is wrong.
    named: the explanation that is found; "" where none is.
    """

    kind: str
    plant: Plant
    first: tuple[str, str]
    named: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    lora: bool = False


BUGS: dict[str, Bug] = {}


def bug(
    name: str, kind: str, first: tuple[str, str], named: str = "", lora: bool = False, **options: Any
) -> Callable[[Plant], Plant]:
    """Enter a function that plants a bug."""

    def enter(plant: Plant) -> Plant:
        BUGS[name] = Bug(kind, plant, first, named, options, lora)
        return plant

    return enter


def only(model: Any, name: str) -> Any:
    """The module whose name ends so."""
    (found,) = (module for path, module in model.named_modules() if path.endswith(name))
    return found


def returns(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    forward = module.forward
    module.forward = lambda *args: change(forward(*args))  # type: ignore[method-assign]


def untouched(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def rank_of(mesh: DeviceMesh) -> int:
    return mesh.get_local_rank("tp")


@bug("gate and up do not sum their input's gradient", "llama", ("gradient", "post_attention_layernorm.weight"),
     "sum over tp missing")  # fmt: skip
def _(model: Any, mesh: DeviceMesh) -> None:
    for name in ("gate_proj", "up_proj"):
        only(model, name).entrance = untouched


@bug("a row parallel product is not summed", "llama", ("output", "o_proj"), "sum over tp missing")
def _(model: Any, mesh: DeviceMesh) -> None:
    layer = only(model, "o_proj")
    layer.forward = lambda x: F.linear(x, layer.weight)


@bug("a row parallel product is summed twice", "llama", ("output", "down_proj"), "summed twice over tp")
def _(model: Any, mesh: DeviceMesh) -> None:
    returns(only(model, "down_proj"), lambda y: sg.all_reduce(y, mesh))


@bug("the gradient of a norm of heads is not summed", "qwen3", ("gradient", "_norm.weight"), "sum over tp missing")
def _(model: Any, mesh: DeviceMesh) -> AbstractContextManager[Any]:
    return _unsummed()


def _unsummed() -> AbstractContextManager[Any]:
    from shardgrad.models import flow, summed

    both = ExitStack()
    for room in (flow, summed):
        both.enter_context(patch.object(room, "replicate", untouched))
    return both


@bug("KV heads are off by one", "llama", ("output", "k_proj"), num_attention_heads=6, num_key_value_heads=3)
def _(model: Any, mesh: DeviceMesh) -> None:
    layer = only(model, "k_proj")
    right = layer.heads

    class Off(Heads):
        shares = right.shares

    layer.heads = Off(**{**asdict(right), "first_kv": 1 - right.first_kv})


@bug("gate and up are interchanged", "phi3", ("output", "gate_up_proj"), "blocks interchanged")
def _(model: Any, mesh: DeviceMesh) -> None:
    returns(only(model, "gate_up_proj"), lambda y: torch.cat(y.chunk(2, -1)[::-1], -1))


_GPT2 = {
    "**.attn.c_proj": "h/tp,k -> d",
    "**.attn.split_size": "h/tp,k",
    "**.mlp.c_fc": "d -> f/tp",
    "**.mlp.c_proj": "f/tp -> d",
}


@bug("parts inside heads, where the model has heads inside parts", "gpt2", ("output", "attn.c_proj"),
     plan={**_GPT2, "**.attn.c_attn": "d -> h/tp,c,k"})  # fmt: skip
def _(model: Any, mesh: DeviceMesh) -> None:
    """The plan is wrong."""


_NEOX = {"**.attention.dense": "h/tp,k -> d"}


@bug("heads inside parts, where the model has parts inside heads", "gpt_neox", ("output", "attention.dense"),
     plan={**_NEOX, "**.attention.query_key_value": "d -> c,h/tp,k"})  # fmt: skip
def _(model: Any, mesh: DeviceMesh) -> None:
    """The plan is wrong."""


@bug("query heads are those of the other rank", "llama", ("output", "q_proj"), "shards permuted")
def _(model: Any, mesh: DeviceMesh) -> None:
    ranks = mesh.size()
    other = (rank_of(mesh) + 1) % ranks
    returns(only(model, "q_proj"), lambda y: gather_replicated(y, mesh, "tp", -1).chunk(ranks, -1)[other])


@bug("a tied weight has the gradient of one use", "gpt2", ("gradient", "wte.weight"), "one use not counted")
def _(model: Any, mesh: DeviceMesh) -> None:
    layer = only(model, "lm_head")
    split = layer._split
    layer._split = lambda name: [piece.detach() for piece in split(name)]


@bug("the bias of a row parallel layer is added by every rank", "gpt2", ("output", "mlp.c_proj"),
     "bias counted by every rank of tp")  # fmt: skip
def _(model: Any, mesh: DeviceMesh) -> None:
    layer = only(model, "mlp.c_proj")
    returns(layer, lambda y: y + (mesh.size() - 1) * layer.bias)


@bug("a shard of the vocabulary begins one row late", "llama", ("output", "embed_tokens"))
def _(model: Any, mesh: DeviceMesh) -> None:
    layer = only(model, "embed_tokens")
    lookup, late = layer._lookup, rank_of(mesh)
    layer._lookup = lambda ids, weight: lookup((ids - late).clamp(min=0), weight)


@bug("the loss is of this rank's vocabulary", "llama", ("loss", "loss"))
def _(model: Any, mesh: DeviceMesh) -> None:
    first, last = (
        only(model, "lm_head").stored_output().features.indices({"tp": mesh.size()}, {"tp": rank_of(mesh)})[[0, -1]]
    )

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        wanted = F.pad(labels, (0, 1), value=-100)[..., 1:]
        mine = (wanted >= first) & (wanted <= last)
        return F.cross_entropy(logits.flatten(0, 1), (wanted - first).masked_fill(~mine, -100).flatten())

    model.loss_function = loss


@bug("experts do not sum the gradient of their gates", "mixtral", ("gradient", "gate.weight"), "sum over tp missing")
def _(model: Any, mesh: DeviceMesh) -> AbstractContextManager[Any]:
    from shardgrad.models import experts

    enter = experts.replicate
    gates = model.config.num_experts_per_tok
    return patch.object(experts, "replicate", lambda x, *rest: x if x.shape[-1] == gates else enter(x, *rest))


@bug("the gathered sequence's gradient is sliced, not summed", "llama",
     ("gradient", "post_attention_layernorm.weight"), "sum over tp missing", sequence=True)  # fmt: skip
def _(model: Any, mesh: DeviceMesh) -> AbstractContextManager[Any]:
    from shardgrad.models import sequence

    return patch.object(sequence, "all_gather", gather_replicated)


@bug("norms in the sequence's stream do not sum their gradients", "llama", ("gradient", "layernorm.weight"),
     "sum over tp missing", sequence=True)  # fmt: skip
def _(model: Any, mesh: DeviceMesh) -> AbstractContextManager[Any]:
    return _unsummed()


@bug("the position bias is of other heads", "t5", ("output", "relative_attention_bias"), "shifted")
def _(model: Any, mesh: DeviceMesh) -> None:
    returns(only(model, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"), lambda y: y.roll(1, -1))


@bug("a norm over all heads is over this rank's", "olmo2", ("output", "q_norm"))
def _(model: Any, mesh: DeviceMesh) -> None:
    layer = only(model, "q_norm")
    layer.forward = lambda x: F.rms_norm(x, x.shape[-1:], layer.weight, layer.eps)


@bug("the row of padding is trained", "llama", ("gradient", "embed_tokens.weight"), pad_token_id=VOCAB - 1)
def _(model: Any, mesh: DeviceMesh) -> None:
    only(model, "embed_tokens").padding_idx = None


@bug("the embedding is not scaled", "gemma2", ("output", "embed_tokens"), "scaled by a constant", attention="eager")
def _(model: Any, mesh: DeviceMesh) -> None:
    only(model, "embed_tokens").embed_scale = None


@bug("LoRA's A has its rank's term of the gradient", "llama", ("gradient", "q_proj.lora_A.default.weight"),
     "sum over tp missing", lora=True)  # fmt: skip
def _(model: Any, mesh: DeviceMesh) -> None:
    layer = only(model, "q_proj.lora_B.default")
    layer.forward = lambda x: F.linear(x, layer.weight)


@bug("LoRA's A of a row parallel layer is summed twice", "llama", ("output", "o_proj.lora_A.default"),
     "summed twice over tp", lora=True)  # fmt: skip
def _(model: Any, mesh: DeviceMesh) -> None:
    returns(only(model, "o_proj.lora_A.default"), lambda y: sg.all_reduce(y, mesh))


@bug("a frozen weight is trained", "llama", ("gradient", "q_proj.base_layer.weight"), lora=True)
def _(model: Any, mesh: DeviceMesh) -> None:
    only(model, "q_proj.base_layer").weight.requires_grad_(True)


def planted(one: Bug, model: Any, mesh: DeviceMesh) -> AbstractContextManager[Any]:
    """Plant it."""
    return one.plant(model, mesh) or nullcontext()
