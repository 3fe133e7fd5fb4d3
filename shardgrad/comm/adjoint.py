"""Differentiable collectives, each with its adjoint.

| function            | forward        | backward       | input, over axis  | output           | gradient must be   |
| ------------------- | -------------- | -------------- | ----------------- | ---------------- | ------------------ |
| `replicate`         | nothing        | all-reduce     | replicated        | replicated       | partial (one term) |
| `all_reduce`        | all-reduce     | nothing        | partial           | replicated       | replicated         |
| `all_gather`        | all-gather     | reduce-scatter | sharded on dim    | replicated       | partial (one term) |
| `gather_replicated` | all-gather     | local slice    | sharded on dim    | replicated       | replicated         |
| `reduce_scatter`    | reduce-scatter | all-gather     | partial           | sharded on dim   | sharded likewise   |
| `slice_replicated`  | local slice    | all-gather     | replicated        | sharded on dim   | sharded likewise   |
| `all_to_all`        | all-to-all     | all-to-all     | sharded on concat | sharded on split | sharded likewise   |
| `all_to_all_rows`   | all-to-all     | all-to-all     | rows, by receiver | rows, by sender  | stored likewise    |

A value that is replicated is used in one of two ways: each rank goes on to compute a different term of the loss with it
(then each rank's gradient is one term, partial, and must be summed: `replicate`, `all_gather`), or every rank computes
the same thing (then every rank has the whole gradient already: `all_reduce`, `gather_replicated`). Choosing wrongly
multiplies gradients by the number of ranks, or loses terms; nothing local can notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm import shim
from shardgrad.comm.all_to_all import AllToAll
from shardgrad.comm.collectives import (
    AllGather,
    AllReduce,
    AllToAllRows,
    ReduceScatter,
    gather_ints,
    keep_chunk,
    whole_size,
)
from shardgrad.comm.first_derivatives import entry_by_entry
from shardgrad.comm.mesh import Axis, axis_of, axis_on, view, view_of
from shardgrad.comm.pieces import CHECK, KEY, pieces_here, refuse_exact_on
from shardgrad.comm.trace import traced_op
from shardgrad.errors import ShapeError, shorten
from shardgrad.layout.sizes import chunk, rule


@dataclass(frozen=True, slots=True)
class _Where:
    """The axis, the dim on which a shard lies, and the size of this dim over all ranks (all-to-all: of both dims; of
    rows: how many go to, and come from, each rank)."""

    axis: Axis
    dim: int = 0
    global_size: int = 0
    other: int = 0
    other_global_size: int = 0
    send: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()


def _nothing(x: Tensor, at: _Where) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, at: _Where) -> Tensor:
    return AllReduce(at.axis)(x.clone())


def _all_gather(x: Tensor, at: _Where) -> Tensor:
    return AllGather(at.axis, at.dim, at.global_size)(x)


def _reduce_scatter(x: Tensor, at: _Where) -> Tensor:
    return ReduceScatter(at.axis, at.dim)(x)


def _slice(x: Tensor, at: _Where) -> Tensor:
    return keep_chunk(x, at.axis, at.dim).contiguous()


def _to_split(x: Tensor, at: _Where) -> Tensor:
    return AllToAll(at.axis, at.dim, at.other, at.other_global_size)(x)


def _to_concat(x: Tensor, at: _Where) -> Tensor:
    return AllToAll(at.axis, at.other, at.dim, at.global_size)(x)


def _rows_out(x: Tensor, at: _Where) -> Tensor:
    return AllToAllRows(at.axis, at.send, at.receive)(x)


def _rows_back(x: Tensor, at: _Where) -> Tensor:
    return AllToAllRows(at.axis, at.receive, at.send)(x)


_Local = Callable[[Tensor, _Where], Tensor]
_PAIRS: dict[str, tuple[_Local, _Local]] = {
    "nothing": (_nothing, _nothing),
    "replicate": (_nothing, _all_reduce),
    "all_reduce": (_all_reduce, _nothing),
    "all_gather": (_all_gather, _reduce_scatter),
    "reduce_scatter": (_reduce_scatter, _all_gather),
    "slice_replicated": (_slice, _all_gather),
    "gather_replicated": (_all_gather, _slice),
    "all_to_all": (_to_split, _to_concat),
    "all_to_all_rows": (_rows_out, _rows_back),
}


@shim.untraced
class _Pair(torch.autograd.Function):
    """One half of a pair; its backward is the other half, and so on: linear, it has all derivatives."""

    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, at: _Where, back: bool) -> Tensor:
        ctx.name, ctx.at, ctx.back = name, at, back
        return _PAIRS[name][back](x, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        return None, _pair(ctx.name, grad, ctx.at, not ctx.back), None, None


@shim.untraced
@entry_by_entry
class _TransformedPair(torch.autograd.Function):
    """The same for torch.func and forward mode. (torch takes longer to call it.)"""

    @staticmethod
    def forward(name: str, x: Tensor, at: _Where, back: bool) -> Tensor:
        return _PAIRS[name][back](x, at)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, _, ctx.at, ctx.back = inputs

    backward = _Pair.backward

    @staticmethod
    def jvp(ctx: Any, _name: None, tangent: Tensor, _at: None, _back: None) -> Tensor:
        return _pair(ctx.name, tangent, ctx.at, ctx.back)


def _pair(name: str, x: Tensor, at: _Where, back: bool) -> Tensor:
    function = _TransformedPair if shim.beyond_backward() else _Pair
    made: Tensor = function.apply(name, x, at, back)
    return made


@torch.library.custom_op(
    "shardgrad::collective",
    mutates_args=(),
    schema="(Tensor x, str pair, bool back, str mesh, str axis, SymInt[] numbers, SymInt[] send, SymInt[] receive)"
    " -> Tensor",
)
@traced_op
def _collective(
    x: Tensor,
    pair: str,
    back: bool,
    mesh: str,
    axis: str,
    numbers: Sequence[int],
    send: Sequence[int],
    receive: Sequence[int],
) -> Tensor:
    """One half of a pair, as an operator that torch.compile does not look into. numbers: of `_Where`, in its order."""
    dim, global_size, other, other_global_size = numbers
    at = _Where(axis_of(mesh, axis), dim, global_size, other, other_global_size, tuple(send), tuple(receive))
    return _PAIRS[pair][back](x, at).contiguous()


@_collective.register_fake
def _(
    x: Tensor,
    pair: str,
    back: bool,
    mesh: str,
    axis: str,
    numbers: Sequence[int],
    send: Sequence[int],
    receive: Sequence[int],
) -> Tensor:
    over, (dim, global_size, other, other_global_size) = axis_of(mesh, axis), numbers
    local, shape = _PAIRS[pair][back], list(x.shape)
    if local is _all_gather:
        shape[dim] = global_size
    elif local is _reduce_scatter:
        shape[dim] = chunk(shape[dim], over.size, over.index)[1]
    elif local in (_to_split, _to_concat):
        gathered, sharded, size = (other, dim, other_global_size) if local is _to_split else (dim, other, global_size)
        shape[gathered], shape[sharded] = size, chunk(shape[sharded], over.size, over.index)[1]
    elif local in (_rows_out, _rows_back):
        shape[0] = sum(receive if local is _rows_out else send)
    return x.new_empty(shape)


shim.ordered(_collective)


class _CompiledPair(torch.autograd.Function):
    """`_Pair` in terms that torch.compile can follow. What a rank does alone stays in the open."""

    @staticmethod
    def forward(
        ctx: Any,
        pair: str,
        x: Tensor,
        mesh: str,
        axis: str,
        place: tuple[int, int],
        numbers: tuple[int, ...],
        send: tuple[int, ...],
        receive: tuple[int, ...],
    ) -> Tensor:
        ctx.pair, ctx.rest = pair, (mesh, axis, place, numbers, send, receive)
        return _half(x, pair, False, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, _half(grad, ctx.pair, True, *ctx.rest), *(None,) * 6


def _half(
    x: Tensor,
    pair: str,
    back: bool,
    mesh: str,
    axis: str,
    place: tuple[int, int],
    numbers: tuple[int, ...],
    send: tuple[int, ...],
    receive: tuple[int, ...],
) -> Tensor:
    if (pair, back) in (("replicate", False), ("all_reduce", True)):
        return x.view_as(x)
    if (pair, back) in (("slice_replicated", False), ("gather_replicated", True)):
        start, length = chunk(x.shape[numbers[0]], *place)
        return x.narrow(numbers[0], start, length).contiguous()
    return _collective(x, pair, back, mesh, axis, numbers, send, receive)


def _apply(name: str, x: Tensor, at: _Where) -> Tensor:
    if at.axis.size == 1:  # in exact mode the same graph as on several ranks, for what is read from it
        alike = not torch.compiler.is_compiling() and KEY in view_of(at.axis).settings
        return _pair("nothing", x, at, False) if alike else x
    if torch.compiler.is_compiling():
        shim.leave_checkpoint()
        numbers = (at.dim, at.global_size, at.other, at.other_global_size)
        place = at.axis.size, at.axis.index
        return _CompiledPair.apply(name, x, at.axis.mesh, at.axis.name, place, numbers, at.send, at.receive)
    return _pair(name, x, at, False)


def along(name: str, x: Tensor, axis: Axis, dim: int = 0, global_size: int = 0) -> Tensor:
    """One of the pairs, for those that hold the axis and not its mesh. Exact mode is theirs to refuse.

    global_size: of `dim`, where it is gathered.
    """
    return _apply(name, x, _Where(axis, dim, global_size))


def _dim(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(f"dim {dim} is out of range for a tensor of shape {tuple(x.shape)}")
    return dim % x.dim()


def _global_size(x: Tensor, axis: Axis, dim: int, size: int | None, mesh: DeviceMesh) -> int:
    """The size of a sharded dim over all ranks: as given (and checked), else exchanged."""
    local = x.shape[dim]
    if size is None:
        if torch.compiler.is_compiling():
            raise ShapeError(f"under torch.compile, say how large dim {dim} is over {axis.name!r}: size=…")
        rows = gather_ints([local], axis, view(mesh).device, "exchange of sizes")
        size = whole_size([row[0] for row in rows], axis, f"dim {dim}")
    expected = chunk(size, axis.size, axis.index)[1]
    if local != expected:
        raise ShapeError(
            f"dim {dim} of local shape {tuple(x.shape)} has size {local}, but {size} over {axis} leaves rank "
            f"{axis.index} of them {expected} ({rule(axis.size)})"
        )
    return size


def _refuse_exact(mesh: DeviceMesh, axis: str, name: str) -> None:
    """A rank's term of a sum is itself a sum over its pieces, of which nothing is known here."""
    instead = "use a layer or a product, whose layout says what the sum is over"
    refuse_exact_on(mesh, [axis], f"the sum in sg.{name} or its gradient", instead)


def _look(x: Tensor, mesh: DeviceMesh) -> None:
    """In exact mode, where a shard comes from that is handed to others. Which axes shard it is not known: any may."""
    settings = {} if torch.compiler.is_compiling() else view(mesh).settings
    if KEY in settings and x.grad_fn is not None:
        settings[CHECK](x, prod(pieces_here(view(mesh), axis) for axis in view(mesh).axes))


@told
def replicate(x: Tensor, mesh: DeviceMesh, axis: str = "tp") -> Tensor:
    """Identity; the gradient is summed over the axis.

    For a tensor that all ranks hold alike and then use differently (each with its own shard of a weight, or of the
    rows): each rank's gradient is one term of the whole. A parameter that is replicated under sequence parallelism
    passes through here. Megatron: copy_to_tensor_model_parallel_region.
    """
    _refuse_exact(mesh, axis, "replicate")
    return _apply("replicate", x, _Where(axis_on(mesh, axis)))


@told
def all_reduce(x: Tensor, mesh: DeviceMesh, axis: str = "tp", *, one_term: bool = False) -> Tensor:
    """Sum over the axis; the gradient passes unchanged.

    Assumes that every rank goes on to compute the same with the sum, so that its gradient is alike on all (and not one
    term of it). Megatron: reduce_from_tensor_model_parallel_region.

    one_term: whether all terms of each element but one are zero: then it is exact mode's sum too.
    """
    if not one_term:
        _refuse_exact(mesh, axis, "all_reduce")
    return _apply("all_reduce", x, _Where(axis_on(mesh, axis)))


@told
def all_gather(x: Tensor, mesh: DeviceMesh, axis: str = "tp", dim: int = 0, *, size: int | None = None) -> Tensor:
    """Concatenate the shards of `dim`; the gradient is summed over the axis and sharded (reduce-scatter).

    Assumes that each rank uses the whole differently, so that its gradient is one term of the sum. If every rank
    computes the same with it, use `gather_replicated`.

    Args:
        x: this rank's shard along `dim`, as the axis shards (torch.chunk, or `set_balanced`).
        size: of `dim` over all ranks; exchanged if not given (one small exchange).

    Raises:
        ShapeError: the shards are not as the axis shards.
    """
    _refuse_exact(mesh, axis, "all_gather")
    return _gathered("all_gather", x, mesh, axis, dim, size)


@told
def gather_replicated(
    x: Tensor, mesh: DeviceMesh, axis: str = "tp", dim: int = 0, *, size: int | None = None
) -> Tensor:
    """Concatenate the shards of `dim`; of the gradient each rank keeps its slice.

    Assumes that every rank computes the same with the whole, so that its gradient is alike and complete on all.
    Arguments and errors as `all_gather`. Megatron: gather_from_tensor_model_parallel_region.
    """
    return _gathered("gather_replicated", x, mesh, axis, dim, size)


def _gathered(name: str, x: Tensor, mesh: DeviceMesh, axis_name: str, dim: int, size: int | None) -> Tensor:
    axis, dim = axis_on(mesh, axis_name), _dim(x, dim)
    _look(x, mesh)
    global_size = _global_size(x, axis, dim, size, mesh) if axis.size > 1 else 0
    return _apply(name, x, _Where(axis, dim, global_size))


@told
def reduce_scatter(x: Tensor, mesh: DeviceMesh, axis: str = "tp", dim: int = 0, *, one_term: bool = False) -> Tensor:
    """Sum over the axis, and keep this rank's chunk of `dim`; the gradient is all-gathered.

    Assumes of its gradient that it is stored as the result is. Uneven and empty chunks are fine.

    one_term: as of `all_reduce`.
    """
    if not one_term:
        _refuse_exact(mesh, axis, "reduce_scatter")
    dim = _dim(x, dim)
    return _apply("reduce_scatter", x, _Where(axis_on(mesh, axis), dim, x.shape[dim]))


@told
def slice_replicated(x: Tensor, mesh: DeviceMesh, axis: str = "tp", dim: int = 0) -> Tensor:
    """Keep this rank's chunk of `dim` of a tensor that all ranks hold alike; the gradient is all-gathered.

    Assumes of its gradient that it is stored as the result is; the gathered gradient is then alike on all ranks.
    Megatron: scatter_to_tensor_model_parallel_region.
    """
    dim = _dim(x, dim)
    return _apply("slice_replicated", x, _Where(axis_on(mesh, axis), dim, x.shape[dim]))


@told
def all_to_all(
    x: Tensor, mesh: DeviceMesh, axis: str = "tp", *, split_dim: int, concat_dim: int, size: int | None = None
) -> Tensor:
    """From shards of `concat_dim` to shards of `split_dim`; the gradient goes the way back.

    Args:
        x: this rank's shard along `concat_dim`, whole along `split_dim`.
        size: of `concat_dim` over all ranks; exchanged if not given (one small exchange).

    Raises:
        ShapeError: both dims are the same, or the shards are not as the axis shards.
    """
    over = axis_on(mesh, axis)
    split_dim, concat_dim = _dim(x, split_dim), _dim(x, concat_dim)
    if split_dim == concat_dim:
        raise ShapeError(f"all_to_all splits and concatenates dim {split_dim}: the dims must differ")
    _look(x, mesh)
    global_size = _global_size(x, over, concat_dim, size, mesh) if over.size > 1 else 0
    return _apply("all_to_all", x, _Where(over, split_dim, x.shape[split_dim], concat_dim, global_size))


@told
def all_to_all_rows(
    x: Tensor, mesh: DeviceMesh, axis: str = "tp", *, send: Sequence[int], receive: Sequence[int]
) -> Tensor:
    """Rows to the ranks that want them, as many to each as there are; the gradients of the rows go the way back.

    Args:
        x: rows along dim 0: first those for the first rank of the axis, then those for the second, …
        send: how many rows go to each rank of the axis, this one included.
        receive: how many come from each. Rank r's `receive[s]` is rank s's `send[r]`: the ranks must know, or exchange
            it first.

    Shapes: x [sum(send), …] → [sum(receive), …], by sender.

    Raises:
        ShapeError: not one number for each rank, or x does not have as many rows as are sent.
    """
    over = axis_on(mesh, axis)
    for name, counts in (("send", send), ("receive", receive)):
        if len(counts) != over.size or any(count < 0 for count in counts):
            raise ShapeError(
                f"{name} says how many rows for each of the {over.size} ranks of {over}, not {shorten(list(counts))}"
            )
    if x.dim() == 0 or x.shape[0] != sum(send):
        raise ShapeError(
            f"x of shape {tuple(x.shape)} does not have the {sum(send)} rows that are sent: {shorten(list(send))}"
        )
    if send[over.index] != receive[over.index]:
        raise ShapeError(f"rank {over.index} sends itself {send[over.index]} rows, but receives {receive[over.index]}")
    _look(x, mesh)
    return _apply("all_to_all_rows", x, _Where(over, send=tuple(send), receive=tuple(receive)))
