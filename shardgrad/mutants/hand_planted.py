"""Bugs planted into the block that is sharded by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.mutants import by_hand
from shardgrad.mutants.by_hand import move
from shardgrad.mutants.mutant import MADE_UP, Mutant, Program, enters, on_gradient

TP, SP = "by hand", "by hand, rows sharded"
MUTANTS: list[Mutant] = []
bug = enters(MUTANTS)
_7452 = "Megatron-LM #7452, a list of wrong gradients and sums that nothing notices"
_RETURN = "`all_reduce(x.contiguous()); return x`, found in three published frameworks"


def in_program(name: str, program: str, expected: str, origin: str, plant: Callable[[Program], None]) -> None:
    MUTANTS.append(Mutant(name, program, plant, origin, expected))


@bug("the sum of a row-parallel product is dropped", TP, "sum over tp missing", _RETURN)
def _(model: Any) -> None:
    tp = model.down.tp

    def dropped(x: Tensor) -> Tensor:
        tp.sum(x)
        return x

    model.down.leave = move(dropped, tp.same)


@bug("rows of the vocabulary are not summed", TP, "sum over tp missing", _7452)
def _(model: Any) -> None:
    model.embedding.leave = model.tp.same


@bug("dX of the head is not summed", TP, "sum over tp missing", _7452)
def _(model: Any) -> None:
    model.head.enter = model.tp.same


@bug("dX of one of two products of an input is not summed", TP, "sum over tp missing", _7452)
def _(model: Any) -> None:
    model.gate.enter = model.tp.same


@bug("dX is summed twice", TP, "summed twice over tp", "pytorch #160285, gradients doubled by expert parallelism")
def _(model: Any) -> None:
    model.head.enter = lambda x: model.tp.copy(model.tp.copy(x))


@bug("the sum's backward is a sum", TP, "summed twice over tp", "the backward of torch's functional all_reduce")
def _(model: Any) -> None:
    model.down.leave = move(model.tp.sum, model.tp.sum)


@bug("mean of a product's terms", TP, "mean over tp where a sum belongs")
def _(model: Any) -> None:
    model.down.leave = move(lambda x: model.tp.sum(x) / model.tp.size, model.tp.same)


@bug("every rank adds the bias", TP, "bias counted by every rank of tp", "torchtitan #4245")
def _(model: Any) -> None:
    model.down.before, model.down.after = 1.0, 0.0


@bug("every rank adds bias/p", TP, "bias divided by the ranks of tp", "torchtitan #4332")
def _(model: Any) -> None:
    model.down.before, model.down.after = 1.0 / model.tp.size, 0.0


@bug("a bias is left out", TP, "bias left out")
def _(model: Any) -> None:
    model.out.after = 0.0


@bug(
    "a norm's gradient is not summed over the rows' ranks",
    SP,
    "sum over tp missing",
    "gpt-neox #1257, Megatron-LM #1446",
)
def _(model: Any) -> None:
    model.norm1.share = model.tp.same


@bug("a bias's gradient is not summed over the rows' ranks", SP, "sum over tp missing", "bigcode Megatron-LM #11 asks")
def _(model: Any) -> None:
    model.down.share = model.tp.same


@bug("a norm's complete gradient is summed", TP, "summed twice over tp")
def _(model: Any) -> None:
    model.norm1.share = model.tp.copy


@bug("a norm's gradient is averaged over the rows' ranks", SP, "mean over tp where a sum belongs")
def _(model: Any) -> None:
    model.norm2.share = move(model.tp.same, lambda g: model.tp.sum(g) / model.tp.size)


@bug("the vocabulary is counted from the last rank", TP, "shards permuted")
def _(model: Any) -> None:
    model.embedding.start = (model.tp.size - 1 - model.tp.index) * model.embedding.weight.shape[0]


@bug("the vocabulary starts one later", TP, "shifted")
def _(model: Any) -> None:
    model.embedding.start += 1


@bug("ids of other ranks are not masked", TP, "wrong rows looked up")
def _(model: Any) -> None:
    model.embedding.masked = False


@bug("the query uses the key's weight", TP, "another tensor")
def _(model: Any) -> None:
    query, key = model.query, model.key
    query.forward = lambda x: F.linear(query.enter(x), key.weight, query.bias)


@bug("gate and up are exchanged", TP, "another tensor")
def _(model: Any) -> None:
    gate, up = model.gate.forward, model.up.forward
    model.gate.forward, model.up.forward = up, gate


@bug("heads and their features are interleaved", TP, "interleaved")
def _(model: Any) -> None:
    model.attend.arrange = lambda y: y.unflatten(1, (-1, by_hand.HEAD_DIM)).transpose(1, 2).flatten(1)


@bug("scores are scaled by another dim", TP, "scores scaled by another constant")
def _(model: Any) -> None:
    model.attend.scale = by_hand.D**-0.5


@bug("another epsilon", TP, "another epsilon")
def _(model: Any) -> None:
    model.norm2.eps = 1e-3


@bug("the loss is divided by the ranks", TP, "mean over tp where a sum belongs", "compare Megatron-LM #673")
def _(model: Any) -> None:
    model.criterion.scale = 1.0 / model.tp.size


@bug(
    "the backward of the loss's sums is a sum",
    TP,
    "summed twice over tp",
    "the backward of torch's functional all_reduce",
)
def _(model: Any) -> None:
    model.criterion.sum = move(model.tp.sum, model.tp.sum)


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


@bug("every rank gets the first rank's rows of dX", SP, "another rank's shard", "nanotron #46")
def _(model: Any) -> None:
    tp = model.tp
    model.head.enter = move(tp.cat, lambda g: tp.sum(g).chunk(tp.size)[0].contiguous())


@bug("rows are gathered in reverse order of ranks", SP, "gathered in the wrong order")
def _(model: Any) -> None:
    tp = model.tp
    model.head.enter = move(lambda x: torch.cat(tp.cat(x).chunk(tp.size)[::-1]), tp.sum_slice)


@bug("each rank keeps the next rank's rows", SP, "shards permuted")
def _(model: Any) -> None:
    tp = model.tp
    model.down.leave = move(lambda x: tp.sum(x).chunk(tp.size)[(tp.index + 1) % tp.size].contiguous(), tp.cat)


@bug("rows are sharded without being summed", SP, "sum over tp missing", _7452)
def _(model: Any) -> None:
    model.down.leave = model.tp.slice_rows


@bug("dX's rows are sharded without being summed", SP, "sum over tp missing", _7452)
def _(model: Any) -> None:
    model.head.enter = move(model.tp.cat, model.tp.slice)


@bug("a replica has drifted", TP, "replicas have drifted apart")
def _(model: Any) -> None:
    with torch.no_grad():
        model.norm1.weight += 1e-3 * (model.tp.index == model.tp.size - 1)


@bug("a weight is detached", TP, "never computed")
def _(model: Any) -> None:
    up = model.up
    up.forward = lambda x: F.linear(up.enter(x), up.weight.detach(), up.bias)


@bug("a weight's gradient is never flushed", TP, "stale", "compare TransformerEngine #3437")
def _(model: Any) -> None:
    on_gradient(model, "up.weight", torch.zeros_like)


@bug("one rank scales its gradient", TP, "scaled by a constant")
def _(model: Any) -> None:
    on_gradient(model, "up.weight", lambda g: g * (1.1 if model.tp.index == model.tp.size - 1 else 1.0))


@bug("a gradient passes bfloat16", TP, "rounded to a lower precision", "compare pytorch #144359")
def _(model: Any) -> None:
    on_gradient(model, "up.weight", lambda g: g.bfloat16().to(g))


@bug("the gradient of a sharded weight is summed", TP, "shards summed over tp")
def _(model: Any) -> None:
    on_gradient(model, "gate.weight", model.tp.sum)


@bug("the gradient of a sharded weight is averaged", TP, "shards averaged over tp")
def _(model: Any) -> None:
    on_gradient(model, "gate.weight", lambda g: model.tp.sum(g) / model.tp.size)


@bug("a gradient is a view instead of a transpose", TP, "transposed")
def _(model: Any) -> None:
    on_gradient(model, "key.weight", lambda g: g.t().reshape(g.shape))


@bug("the last row of a gradient is missing", TP, "stale")
def _(model: Any) -> None:
    on_gradient(model, "value.weight", lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])]))


@bug("a gradient is one column off", TP, "shifted")
def _(model: Any) -> None:
    on_gradient(model, "value.weight", lambda g: g.roll(1, 1))


@bug("an element is not a number", TP, "not finite")
def _(model: Any) -> None:
    on_gradient(model, "head.weight", lambda g: g.index_fill(0, torch.tensor([0]), float("nan")))


def _clip(times: int) -> Callable[[Program], None]:
    def plant(program: Program) -> None:
        program.clip = partial(by_hand.clip, times=times if times else program.mesh.size())

    return plant


def _own_clip(program: Program) -> None:
    program.clip = lambda model, most: nn.utils.clip_grad_norm_(model.parameters(), most)


def _forgetful(program: Program) -> None:
    up = program.parallel.get_parameter("up.bias")
    program.optimizer = lambda ps: torch.optim.SGD([p for p in ps if p is not up], lr=0.05, foreach=False)


in_program(
    "the norm counts replicas p times", TP, "replicated gradients counted by every rank",
    "NeMo-RL #3788, ROCm TransformerEngine #715", _clip(0),
)  # fmt: skip
in_program(
    "the norm is each rank's own",
    TP,
    "sum over tp missing",
    "torchtune #2420, clipping under tensor parallelism",
    _own_clip,
)
in_program("a parameter is not given to the optimizer", TP, "stale", MADE_UP, _forgetful)
