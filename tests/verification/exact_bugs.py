"""Bugs for `verify_exact` to find, planted alike on all ranks: each is nothing on one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact_programs import KV_HEADS, RIGHT, SEQUENCE_PARALLEL, Program, Small
from torch import Tensor, nn

import shardgrad as sg
from shardgrad.comm.collectives import AllGather, AllReduce, Collective, ReduceScatter, keep_chunk
from shardgrad.comm.mesh import Axis, view
from shardgrad.comm.tree import TreeAllReduce, TreeReduceScatter
from shardgrad.nn import dropout, positions, token_statistics, vocabulary

After = Callable[[Tensor, Tensor, Any], Tensor]
"""What a collective returns instead: of its result, of what it was given, and of itself."""
PARTS = "a parameter's gradient summed over pieces"
SUMS = "all-reduce of sums over the vocabulary"


@dataclass(frozen=True)
class Bug:
    """axis: that has several ranks. patch: what is done to the library. ranks: the fewest that show it."""

    name: str
    program: Program
    axis: str = "tp"
    patch: Callable[[pytest.MonkeyPatch], None] | None = None
    ranks: int = 2


def alter(kind: type[Collective], what: str, after: After) -> Callable[[pytest.MonkeyPatch], None]:
    """Let every collective of this kind and description return something else."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        start, wait, call = kind.start, kind.wait, kind.__call__

        def altered_start(self: Collective, x: Tensor) -> Any:
            return (start(self, x.clone()), x.clone()) if self.what == what else start(self, x)

        def altered_wait(self: Collective, handle: Any) -> Tensor:
            return after(wait(self, handle[0]), handle[1], self) if self.what == what else wait(self, handle)

        def altered_call(self: Collective, x: Tensor) -> Tensor:
            return after(call(self, x.clone()), x, self) if self.what == what else call(self, x)

        if kind is AllReduce:  # whose call is no start and wait
            monkeypatch.setattr(kind, "__call__", altered_call)
        else:
            monkeypatch.setattr(kind, "start", altered_start)
            monkeypatch.setattr(kind, "wait", altered_wait)
            monkeypatch.setattr(kind, "__call__", Collective.__call__)

    return patch


def dropped(y: Tensor, x: Tensor, of: Any) -> Tensor:
    """What this rank had itself."""
    return x if x.shape == y.shape else keep_chunk(x, of.axis, of._dim).clone()


def twice(y: Tensor, x: Tensor, of: Any) -> Tensor:
    return y * of.axis.size


def averaged(y: Tensor, x: Tensor, of: Any) -> Tensor:
    return y / of.axis.size


def next_ranks(y: Tensor, axis: Axis) -> Tensor:
    """The next rank's tensor."""
    everyones = AllGather(axis, 0, axis.size * y.numel())(y.contiguous().view(-1))
    return everyones.chunk(axis.size)[(axis.index + 1) % axis.size].clone().view(y.shape)


def another_ranks(y: Tensor, x: Tensor, of: Any) -> Tensor:
    return next_ranks(y, of.axis)


def backwards(y: Tensor, x: Tensor, of: Any) -> Tensor:
    """Shards in the reverse order of ranks."""
    return torch.cat(y.chunk(of.axis.size, of._dim)[::-1], of._dim)


def terms(x: Tensor, of: Any) -> tuple[Tensor, ...]:
    return AllGather(of.axis, 0, of.axis.size * x.numel())(x.reshape(-1)).view(of.axis.size, *x.shape).unbind()


def own(total: Tensor, y: Tensor, of: Any) -> Tensor:
    return total if total.shape == y.shape else keep_chunk(total, of.axis, of._dim).clone()


def from_the_left(y: Tensor, x: Tensor, of: Any) -> Tensor:
    first, *rest = terms(x, of)
    total = first.clone()
    for term in rest:
        total += term
    return own(total, y, of)


def in_bfloat16(y: Tensor, x: Tensor, of: Any) -> Tensor:
    return own(sum(term.bfloat16() for term in terms(x, of)).to(x.dtype), y, of)  # type: ignore[union-attr]


def without_the_last(y: Tensor, x: Tensor, of: Any) -> Tensor:
    return own(sum(terms(x, of)[:-1], torch.zeros_like(x)), y, of)


def backends_own(y: Tensor, x: Tensor, of: Any) -> Tensor:
    made: Collective = AllReduce(of.axis) if x.shape == y.shape else ReduceScatter(of.axis, of._dim)
    return made(x.clone())


def clipped_first(y: Tensor, x: Tensor, of: Any) -> Tensor:
    """Each rank's term clipped, and then summed."""
    return own(sum(t * min(1.0, 0.01 / float(t.norm())) for t in terms(x, of)), y, of)  # type: ignore[arg-type]


def reduced_once(y: Tensor, x: Tensor, of: Any) -> Tensor:
    """Of target's logit and sum of exponentials, the sum that of this rank's vocabulary alone."""
    return torch.cat([y[:1], x[1:]])


MUTANTS: list[Bug] = []


def collective(
    name: str, kind: type[Collective], what: str, after: After, *, program: Program = RIGHT, axis: str = "tp"
) -> None:
    fewest = 4 if after in (from_the_left, backends_own) else 2  # of two ranks, every order is the same
    MUTANTS.append(Bug(name, program, axis, alter(kind, what, after), fewest))


for _name, _after in {
    "dropped": dropped, "done twice": twice, "a mean": averaged, "in bfloat16": in_bfloat16,
    "from the left": from_the_left, "without the last rank": without_the_last, "the backend's": backends_own,
}.items():  # fmt: skip
    collective(f"the all-reduce of Y: {_name}", TreeAllReduce, "all-reduce of Y", _after)
    collective(f"the all-reduce of dX: {_name}", TreeAllReduce, "all-reduce of dX", _after)
    collective(f"the all-reduce of dW: {_name}", TreeAllReduce, "all-reduce of dW", _after, axis="dp")
    collective(f"the all-reduce of db: {_name}", TreeAllReduce, "all-reduce of db", _after, axis="dp")
    collective(
        f"the reduce-scatter of Y: {_name}", TreeReduceScatter, "reduce-scatter of Y", _after, program=SEQUENCE_PARALLEL
    )
    collective(
        f"the reduce-scatter of dX: {_name}", TreeReduceScatter, "reduce-scatter of dX", _after,
        program=SEQUENCE_PARALLEL,
    )  # fmt: skip
    collective(f"a norm's gradient summed: {_name}", TreeAllReduce, PARTS, _after, program=SEQUENCE_PARALLEL)
    if _after not in (from_the_left, backends_own):  # one number may be rounded alike in any order
        collective(f"the sum of losses: {_name}", TreeAllReduce, "all-reduce of the sum of losses", _after, axis="dp")
collective("dW clipped before the sum", TreeAllReduce, "all-reduce of dW", clipped_first, axis="dp")
for _what in ("X", "dY"):
    collective(
        f"the all-gather of {_what}: backwards", AllGather, f"all-gather of {_what}", backwards,
        program=SEQUENCE_PARALLEL,
    )  # fmt: skip
for _what in ("Y", "dX"):
    collective(
        f"the reduce-scatter of {_what}: another rank's rows", TreeReduceScatter, f"reduce-scatter of {_what}",
        another_ranks, program=SEQUENCE_PARALLEL,
    )  # fmt: skip
collective("softmax over the rank's own vocabulary", TreeAllReduce, SUMS, reduced_once)
collective("the sums of softmax done twice", TreeAllReduce, SUMS, twice)
collective("the maxima are the rank's own", AllReduce, "all-reduce of maxima", dropped)
collective(
    "the number of tokens is the rank's own", AllReduce, "all-reduce of the number of tokens", dropped, axis="dp"
)


# Of two ranks, each uses one of the two KV heads alone.
MUTANTS.append(Bug("KV heads' gradients not summed", RIGHT, "tp", alter(TreeAllReduce, PARTS, dropped), 4))


def planted(name: str, program: Program = RIGHT, axis: str = "tp") -> Callable[[Callable[[Any], None]], None]:
    """Enter a function that plants a bug into the model."""

    def enter(plant: Callable[[Any], None]) -> None:
        MUTANTS.append(Bug(name, replace(program, planted=plant), axis))

    return enter


def after_backward(name: str, program: Program = RIGHT, axis: str = "tp") -> Callable[[Callable[[Any], None]], None]:
    """Enter a function that spoils the gradients of the model."""

    def enter(spoil: Callable[[Any], None]) -> None:
        MUTANTS.append(Bug(name, replace(program, after=spoil), axis))

    return enter


def patched(name: str, program: Program = RIGHT, axis: str = "tp") -> Callable[[Callable[[Any], None]], None]:
    def enter(patch: Callable[[pytest.MonkeyPatch], None]) -> None:
        MUTANTS.append(Bug(name, program, axis, patch))

    return enter


def tp_of(model: Small, axis: str = "tp") -> Axis:
    return view(model.mesh).axes[axis]


def _biased(model: Any, times: Callable[[int], float]) -> None:
    down, forward = model.mlp.down, model.mlp.down.forward
    down.forward = lambda x, s=None: forward(x, s) + (times(tp_of(model).size) - 1.0) * down.bias


@planted("every rank adds the bias")
def _(model: Any) -> None:
    _biased(model, float)


@planted("the bias is divided by the ranks")
def _(model: Any) -> None:
    _biased(model, lambda ranks: 1 / ranks)


@planted("no rank adds the bias")
def _(model: Any) -> None:
    _biased(model, lambda ranks: 0.0)


class _ByHand(torch.autograd.Function):
    """X W of a rank, summed over the ranks: one product, however many pieces it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, chunks: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = F.linear(x, weight) if chunks == 1 else sum(map(F.linear, x.chunk(chunks, -1), weight.chunk(chunks, -1)))
        return AllReduce(axis)(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.flatten(0, -2).t() @ x.flatten(0, -2), None, None


def _by_hand(chunks: int) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        down, axis = model.mlp.down, tp_of(model)
        down.forward = lambda x, s=None: _ByHand.apply(x, down.weight, axis, chunks) + down.bias

    return plant


planted("a product that is not in pieces")(_by_hand(1))
planted("a product in other pieces, as of overlap")(_by_hand(5))


@planted("the vocabulary starts at the next rank's")
def _(model: Any) -> None:
    axis, embedding = tp_of(model), model.embedding
    embedding.first_id = (axis.index + 1) % axis.size * embedding.rows


@planted("the vocabulary starts one later")
def _(model: Any) -> None:
    model.embedding.first_id += 1


@planted("the loss is that of the rank's own tokens", axis="dp")
def _(model: Any) -> None:
    model.token_axes = ()


@planted("each rank's query heads use the next KV head")
def _(model: Any) -> None:
    pieces = model.attention._pieces
    model.attention._pieces = lambda: [replace(p, first_kv=(p.first_kv + 1) % KV_HEADS) for p in pieces()]


@planted("a replica is not the same")
def _(model: Any) -> None:
    with torch.no_grad():
        model.norm2.weight[3] *= 1 + 2e-7 * (tp_of(model).index == tp_of(model).size - 1)


@planted("shards of the initial weights exchanged")
def _(model: Any) -> None:
    with torch.no_grad():
        model.mlp.up.weight.copy_(next_ranks(model.mlp.up.weight.detach(), tp_of(model)))


@planted("another rank's weights, in forward")
def _(model: Any) -> None:
    up, axis = model.mlp.up, tp_of(model)
    swapped = up.forward

    def forward(x: Tensor, s: int | None = None) -> Tensor:
        before = up.weight.detach().clone()
        up.weight.data.copy_(next_ranks(before, axis))
        y: Tensor = swapped(x, s)
        up.weight.data.copy_(before)
        return y

    up.forward = forward


@planted("a weight is detached")
def _(model: Any) -> None:
    up = model.mlp.up
    forward = up.forward
    up.weight.requires_grad_(False)
    up.forward = lambda x, s=None: forward(x, s)


@after_backward("a complete bias gradient is summed")
def _(model: Any) -> None:
    AllReduce(tp_of(model))(model.mlp.down.bias.grad)


@after_backward("a norm's complete gradient is summed")
def _(model: Any) -> None:
    AllReduce(tp_of(model))(model.norm2.weight.grad)


@after_backward("the gradient of a sharded weight is summed")
def _(model: Any) -> None:
    AllReduce(tp_of(model))(model.mlp.up.weight.grad)


@after_backward("the next rank's gradient")
def _(model: Any) -> None:
    model.mlp.up.weight.grad.copy_(next_ranks(model.mlp.up.weight.grad, tp_of(model)))


@after_backward("the gradients of two parameters exchanged")
def _(model: Any) -> None:
    norm = model.norm2
    norm.weight.grad, norm.bias.grad = norm.bias.grad, norm.weight.grad


@after_backward("one rank scales its gradient")
def _(model: Any) -> None:
    model.mlp.up.weight.grad *= 1 + 1e-6 * (tp_of(model).index == 0)


@after_backward("a gradient is summed into bfloat16")
def _(model: Any) -> None:
    grad = model.mlp.up.weight.grad
    grad.copy_(grad.bfloat16())


@after_backward("the last bit of one element of one rank")
def _(model: Any) -> None:
    if tp_of(model).index == tp_of(model).size - 1:
        model.mlp.up.weight.grad.view(-1).view(torch.int32)[5] ^= 1


@after_backward("one gradient is missing on one rank")
def _(model: Any) -> None:
    if tp_of(model).index == 0:
        model.norm1.bias.grad = None


@after_backward("a gradient is not a number")
def _(model: Any) -> None:
    model.norm1.bias.grad[2] = float("nan")


@after_backward("an averaged gradient", axis="dp")
def _(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad /= 2


def _patched_dims(module: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(module, name)

        def first(size: int, axes: Any, shape: Any, coordinate: Any) -> Any:
            return real(size, axes, shape, dict.fromkeys(coordinate, 0))

        monkeypatch.setattr(module, name, first)

    return patch


patched("every rank has the first one's dropout mask", SEQUENCE_PARALLEL)(_patched_dims(dropout, "slab"))
patched("replicas of the batch have one dropout mask", RIGHT, "dp")(_patched_dims(dropout, "slab"))


@patched("positions of the next rank", SEQUENCE_PARALLEL)
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    real = positions.slice_replicated

    def shifted(x: Tensor, mesh: Any, axis: str, dim: int) -> Tensor:
        ranks = view(mesh).shape[axis]
        return real(x.roll(-(x.shape[dim] // ranks), dim) if ranks > 1 else x, mesh, axis, dim=dim)

    monkeypatch.setattr(positions, "slice_replicated", shifted)


@patched("the lookup is not summed")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardgrad.nn import embedding

    monkeypatch.setattr(embedding, "all_reduce", lambda y, *_, **__: y)


@patched("smoothing over the rank's own vocabulary")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    real = token_statistics.gradient

    def gradient(logits: Tensor, asked: Any, values: Any, saved: Any, grads: Any, *others: Any) -> Tensor:
        dz = real(logits, asked, values, saved, grads, *others)
        if grads.mean_log_prob is None:
            return dz
        return dz + (grads.mean_log_prob * (1 / logits.shape[-1] - 1 / asked.vocabulary.size)).unsqueeze(-1)

    monkeypatch.setattr(token_statistics, "gradient", gradient)


@patched("targets are looked for in the first rank's vocabulary")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    real = vocabulary.chunk
    monkeypatch.setattr(vocabulary, "chunk", lambda size, ranks, index: (0, real(size, ranks, index)[1]))


def _locally(model: nn.Module, most: float) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), most)


def _replicas_counted(model: nn.Module, most: float) -> Tensor:
    """Of all ranks' gradients, replicas as often as there are ranks."""
    axis = tp_of(model)  # type: ignore[arg-type]
    squares = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
    norm = AllReduce(axis)(torch.as_tensor(squares)).sqrt().float()
    nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return norm


def _twice(model: nn.Module, most: float) -> Tensor:
    sg.clip_grad_norm_(model, most)
    return sg.clip_grad_norm_(model, most)


MUTANTS += [
    Bug("clipped by the rank's own norm", replace(RIGHT, clip=_locally)),
    Bug("the norm counts replicas by every rank", replace(RIGHT, clip=_replicas_counted)),
    Bug("clipped twice", replace(RIGHT, clip=_twice)),
    Bug("not clipped", replace(RIGHT, clip=lambda model, most: sg.clip_grad_norm_(model, 1e9))),
    Bug("the step is scaled by the ranks", replace(RIGHT, rate=0.05), "dp"),
]
