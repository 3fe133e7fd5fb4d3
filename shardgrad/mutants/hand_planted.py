"""Bugs planted into the block that is sharded by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.mutants import by_hand, mutant
from shardgrad.mutants.by_hand import move
from shardgrad.mutants.mutant import MADE_UP, Mutant, Program, enters

TP, SP = "by hand", "by hand, rows sharded"
MUTANTS: list[Mutant] = []
bug = enters(MUTANTS)
sets, hooks = partial(mutant.sets, bug), partial(mutant.hooks, bug)
_7452 = "Megatron-LM #7452, a list of wrong gradients and sums that nothing notices"
_RETURN = "`all_reduce(x.contiguous()); return x`, found in three published frameworks"


@bug("the sum of a row-parallel product is dropped", TP, "sum over tp missing", _RETURN)
def _(model: Any) -> None:
    tp = model.down.tp

    def dropped(x: Tensor) -> Tensor:
        tp.sum(x)
        return x

    model.down.leave = move(dropped, tp.same)


sets("rows of the vocabulary are not summed", TP, "sum over tp missing", "embedding.leave", lambda m: m.tp.same, _7452)
sets("dX of the head is not summed", TP, "sum over tp missing", "head.enter", lambda m: m.tp.same, _7452)
sets("dX of one of two products of an input is not summed", TP, "sum over tp missing", "gate.enter",
     lambda m: m.tp.same, _7452)  # fmt: skip
sets("dX is summed twice", TP, "summed twice over tp", "head.enter", lambda m: lambda x: m.tp.copy(m.tp.copy(x)),
     "pytorch #160285, gradients doubled by expert parallelism")  # fmt: skip
sets("the sum's backward is a sum", TP, "summed twice over tp", "down.leave", lambda m: move(m.tp.sum, m.tp.sum),
     "the backward of torch's functional all_reduce")  # fmt: skip
sets("mean of a product's terms", TP, "mean over tp where a sum belongs", "down.leave",
     lambda m: move(lambda x: m.tp.sum(x) / m.tp.size, m.tp.same))  # fmt: skip


@bug("every rank adds the bias", TP, "bias counted by every rank of tp", "torchtitan #4245")
def _(model: Any) -> None:
    model.down.before, model.down.after = 1.0, 0.0


@bug("every rank adds bias/p", TP, "bias divided by the ranks of tp", "torchtitan #4332")
def _(model: Any) -> None:
    model.down.before, model.down.after = 1.0 / model.tp.size, 0.0


sets("a bias is left out", TP, "bias left out", "out.after", lambda m: 0.0)
sets("a norm's gradient is not summed over the rows' ranks", SP, "sum over tp missing", "norm1.share",
     lambda m: m.tp.same, "gpt-neox #1257, Megatron-LM #1446")  # fmt: skip
sets("a bias's gradient is not summed over the rows' ranks", SP, "sum over tp missing", "down.share",
     lambda m: m.tp.same, "bigcode Megatron-LM #11 asks")  # fmt: skip
sets("a norm's complete gradient is summed", TP, "summed twice over tp", "norm1.share", lambda m: m.tp.copy)
sets("a norm's gradient is averaged over the rows' ranks", SP, "mean over tp where a sum belongs", "norm2.share",
     lambda m: move(m.tp.same, lambda g: m.tp.sum(g) / m.tp.size))  # fmt: skip
sets("the vocabulary is counted from the last rank", TP, "shards permuted", "embedding.start",
     lambda m: (m.tp.size - 1 - m.tp.index) * m.embedding.weight.shape[0])  # fmt: skip


@bug("the vocabulary starts one later", TP, "shifted")
def _(model: Any) -> None:
    model.embedding.start += 1


sets("ids of other ranks are not masked", TP, "wrong rows looked up", "embedding.masked", lambda m: False)


@bug("the query uses the key's weight", TP, "another tensor")
def _(model: Any) -> None:
    query, key = model.query, model.key
    query.forward = lambda x: F.linear(query.enter(x), key.weight, query.bias)


@bug("gate and up are exchanged", TP, "another tensor")
def _(model: Any) -> None:
    gate, up = model.gate.forward, model.up.forward
    model.gate.forward, model.up.forward = up, gate


sets("heads and their features are interleaved", TP, "interleaved", "attend.arrange",
     lambda m: lambda y: y.unflatten(1, (-1, by_hand.HEAD_DIM)).transpose(1, 2).flatten(1))  # fmt: skip
sets("scores are scaled by another dim", TP, "scores scaled by another constant", "attend.scale",
     lambda m: by_hand.D**-0.5)  # fmt: skip
sets("another epsilon", TP, "another epsilon", "norm2.eps", lambda m: 1e-3)
sets("the loss is divided by the ranks", TP, "mean over tp where a sum belongs", "criterion.scale",
     lambda m: 1.0 / m.tp.size, "compare Megatron-LM #673")  # fmt: skip
sets("the backward of the loss's sums is a sum", TP, "summed twice over tp", "criterion.sum",
     lambda m: move(m.tp.sum, m.tp.sum), "the backward of torch's functional all_reduce")  # fmt: skip


@bug(
    "the softmax is over the rank's own vocabulary",
    TP,
    "softmax over the rank's own vocabulary",
    "compare Megatron-LM #737",
)
def _(model: Any) -> None:
    sums = iter(range(1 << 30))
    both = model.tp.reduce
    model.criterion.sum = lambda x: both(x) if next(sums) % 2 else x


@bug("gradients are as many times too large as there are rows", TP, "scaled by a constant", "torchtitan #2972")
def _(model: Any) -> None:
    criterion, times = model.criterion.forward, move(model.tp.same, lambda g: g * by_hand.ROWS)
    model.criterion.forward = lambda logits, targets: criterion(times(logits), targets)


sets("every rank gets the first rank's rows of dX", SP, "another rank's shard", "head.enter",
     lambda m: move(m.tp.cat, lambda g: m.tp.sum(g).chunk(m.tp.size)[0].contiguous()), "nanotron #46")  # fmt: skip
sets("rows are gathered in reverse order of ranks", SP, "gathered in the wrong order", "head.enter",
     lambda m: move(lambda x: torch.cat(m.tp.cat(x).chunk(m.tp.size)[::-1]), m.tp.sum_slice))  # fmt: skip
sets("each rank keeps the next rank's rows", SP, "shards permuted", "down.leave",
     lambda m: move(lambda x: m.tp.sum(x).chunk(m.tp.size)[m.tp.index + 1 - m.tp.size].clone(), m.tp.cat))  # fmt: skip
sets("rows are sharded without being summed", SP, "sum over tp missing", "down.leave", lambda m: m.tp.slice_rows, _7452)
sets("dX's rows are sharded without being summed", SP, "sum over tp missing", "head.enter",
     lambda m: move(m.tp.cat, m.tp.slice), _7452)  # fmt: skip


@bug("a replica has drifted", TP, "replicas have drifted apart")
def _(model: Any) -> None:
    with torch.no_grad():
        model.norm1.weight += 1e-3 * (model.tp.index == model.tp.size - 1)


@bug("a weight is detached", TP, "never computed")
def _(model: Any) -> None:
    up = model.up
    up.forward = lambda x: F.linear(up.enter(x), up.weight.detach(), up.bias)


hooks("a weight's gradient is never flushed", TP, "stale", "up.weight", lambda m: torch.zeros_like,
      "compare TransformerEngine #3437")  # fmt: skip
hooks("one rank scales its gradient", TP, "scaled by a constant", "up.weight",
      lambda m: lambda g: g * (1.1 if m.tp.index == m.tp.size - 1 else 1.0))  # fmt: skip
hooks("a gradient passes bfloat16", TP, "rounded to a lower precision", "up.weight",
      lambda m: lambda g: g.bfloat16().to(g), "compare pytorch #144359")  # fmt: skip
hooks("the gradient of a sharded weight is summed", TP, "shards summed over tp", "gate.weight", lambda m: m.tp.sum)
hooks("the gradient of a sharded weight is averaged", TP, "shards averaged over tp", "gate.weight",
      lambda m: lambda g: m.tp.sum(g) / m.tp.size)  # fmt: skip
hooks("a gradient is a view instead of a transpose", TP, "transposed", "key.weight",
      lambda m: lambda g: g.t().reshape(g.shape))  # fmt: skip
hooks("the last row of a gradient is missing", TP, "stale", "value.weight",
      lambda m: lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])]))  # fmt: skip
hooks("a gradient is one column off", TP, "shifted", "value.weight", lambda m: lambda g: g.roll(1, 1))
hooks("an element is not a number", TP, "not finite", "head.weight",
      lambda m: lambda g: g.index_fill(0, torch.tensor([0]), float("nan")))  # fmt: skip


def _clip(program: Program) -> None:
    program.clip = partial(by_hand.clip, times=program.mesh.size())


def _own_clip(program: Program) -> None:
    program.clip = lambda model, most: nn.utils.clip_grad_norm_(model.parameters(), most)


def _forgetful(program: Program) -> None:
    up = program.parallel.get_parameter("up.bias")
    program.optimizer = lambda ps: torch.optim.SGD([p for p in ps if p is not up], lr=0.05, foreach=False)


MUTANTS += [
    Mutant(
        "the norm counts replicas p times", TP, _clip, "NeMo-RL #3788, ROCm TransformerEngine #715",
        "replicated gradients counted by every rank",
    ),
    Mutant(
        "the norm is each rank's own", TP, _own_clip, "torchtune #2420, clipping under tensor parallelism",
        "sum over tp missing",
    ),
    Mutant("a parameter is not given to the optimizer", TP, _forgetful, MADE_UP, "stale"),
]  # fmt: skip
