"""What layers do between products in exact mode: functions of single pieces, with parameters whose gradients are summed
over the pieces in a tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm import shim
from shardgrad.comm.agree import agree
from shardgrad.comm.collectives import AllGather
from shardgrad.comm.first_derivatives import FirstDerivativeOnly
from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.pieces import (
    exact,
    level_of,
    pieces_here,
    reduce_pieces,
    reduce_pieces_collectives,
    refuse_exact_on,
)
from shardgrad.layout.batch_axis import BatchAxis
from shardgrad.layout.cost import Collective, itemsize
from shardgrad.layout.tree import Level
from shardgrad.nn.replicated import dim_over, for_rows, for_rows_collectives, one, size_before
from shardgrad.nn.sharding import ParamSharding
from shardgrad.ops.micro_batches import held
from shardgrad.ops.origin import check_origin
from shardgrad.ops.pieces import cut, join

Cut = Sequence[tuple[int, Sequence[str]]]
"""The dims of a tensor that axes shard, in order, each with its axes, major first."""


@shim.constant
def is_exact(mesh: DeviceMesh) -> bool:
    """Whether exact mode is set on a mesh."""
    return exact(view(mesh)) is not None


def counts(mesh: DeviceMesh, dims: Cut, x: Tensor | None = None) -> dict[int, int]:
    """The pieces of each dim on this rank.

    x: the tensor that is to be cut: ranks compare its size, which pieces of one size make alike on all of them.

    Raises:
        DisagreementError: on all of them, if it is not.
        LayoutError: x comes from a function whose bits depend on how many elements a rank has (see `check_origin`).
    """
    mesh_view = view(mesh)
    pieces = exact(mesh_view)
    found = {dim: prod(pieces_here(mesh_view, axis) for axis in axes) for dim, axes in dims}
    if x is not None and pieces is not None:
        cutting = [(dim, axis) for dim, axes in dims for axis in axes if pieces[axis] > 1]
        for dim, axis in cutting:
            describe = partial(_size, tuple(x.shape), dim, axis)
            agree(mesh_view, mesh_view.axes[axis], describe, "a tensor in pieces of one size")
        if cutting:
            check_origin(x, prod(found.values()))
    return found


def _size(shape: tuple[int, ...], dim: int, axis: str) -> str:
    return f"a tensor has {shape[dim]} along dim {dim}, which axis {axis} shards"


def in_pieces(function: Callable[..., Tensor], mesh: DeviceMesh, dims: Cut, *tensors: Tensor) -> Tensor:
    """function(*tensors); in exact mode, of the pieces of all tensors, which are cut alike."""
    if not is_exact(mesh):
        return function(*tensors)
    along = counts(mesh, dims, tensors[0])
    return join([function(*pieces) for pieces in zip(*(cut(tensor, along) for tensor in tensors))], along)


def row_pieces(
    parameters: Sequence[Tensor],
    shardings: Sequence[ParamSharding],
    mesh: DeviceMesh,
    dims: Cut,
    *,
    hold: bool = True,
) -> list[list[Tensor]]:
    """Parameters as ranks use them that hold different rows, as `for_rows`, once for each piece of the rows.

    dims: the rows. The pieces are in the order of `cut`. hold: whether each is one use for `micro_batches`; False: the
    caller says so of what it makes of them.
    """
    axes = [axis for _, over in dims for axis in over]
    if not is_exact(mesh):
        return [for_rows(parameters, shardings, axes)]
    marked = [axis for one in shardings for axis in one.spec.grad_partial if axis in axes]
    refuse_exact_on(mesh, marked, "a gradient that is left to the caller", "build layers without accumulate=True")
    parameters = held(view(mesh), parameters) if hold else parameters
    if not axes or not parameters:
        return [list(parameters)]
    made = _Fan.apply(_Uses.of(shardings, view(mesh), dims), *parameters)
    return [list(made[at : at + len(parameters)]) for at in range(0, len(made), len(parameters))]


def row_pieces_collectives(
    name: str, shardings: Sequence[ParamSharding], mesh: DeviceMesh, dims: Cut, dtype: Any
) -> Iterator[Collective]:
    """What `row_pieces` sends in forward and backward, every parameter trained. name: of the gradients summed."""
    axes = [axis for _, over in dims for axis in over]
    if not is_exact(mesh):
        yield from for_rows_collectives(name, shardings, axes, dtype)
        return
    if not shardings:
        return
    uses, width = _Uses.of(shardings, view(mesh), dims), itemsize(dtype)
    alike, sharded = 0, []
    for sharding, scatter in zip(shardings, uses.scatters):
        shape = sharding.block()[1]
        for axis, dim in scatter.items():
            yield from one(mesh, "forward", "all-gather", "W", axis, prod(shape), dtype)
            shape[dim] = size_before(sharding, dim)
        alike += 0 if scatter else prod(shape)
        sharded += [prod(shape)] if scatter else []
    yield from reduce_pieces_collectives("dW", name, alike, width, uses.levels, uses.view)
    for elements in sharded:
        yield from reduce_pieces_collectives("dW", "dW", elements, width, uses.levels, uses.view, scatter=True)


@dataclass(frozen=True)
class _Uses:
    """How parameters are used by the pieces of rows. scatters: of each, the dim by the axis that shards it."""

    view: MeshView
    levels: tuple[Level, ...]
    shardings: tuple[ParamSharding, ...]
    scatters: tuple[Mapping[str, int], ...]

    @classmethod
    def of(cls, shardings: Sequence[ParamSharding], mesh_view: MeshView, dims: Cut) -> _Uses:
        levels = tuple(level_of(mesh_view, *reversed(axes)) for _, axes in dims)
        over = [axis for _, axes in dims for axis in axes]
        scatters = tuple({axis: d for axis in over if (d := dim_over(each, axis)) is not None} for each in shardings)
        return cls(mesh_view, levels, tuple(shardings), scatters)

    @property
    def count(self) -> int:
        return prod(level.count for level in self.levels)

    def whole(self, at: int, parameter: Tensor) -> Tensor:
        for axis, dim in self.scatters[at].items():
            if self.view.shape[axis] > 1:
                parameter = AllGather(self.view.axes[axis], dim, size_before(self.shardings[at], dim))(parameter)
        return parameter

    def summed(self, grads: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The gradient of each parameter, of those of each piece. Those that no axis shards are reduced together."""
        alike = [at for at, scatter in enumerate(self.scatters) if not scatter]
        found: dict[int, Tensor] = {}
        what = "a parameter's gradient summed over pieces"
        if alike:
            flat = [torch.cat([each[at].reshape(-1) for at in alike]) for each in grads]
            total = reduce_pieces(flat, self.levels, self.view, what)
            sizes = [grads[0][at].numel() for at in alike]
            found = {at: part.view(grads[0][at].shape) for at, part in zip(alike, total.split(sizes))}
        for at, scatter in enumerate(self.scatters):
            if scatter:
                found[at] = reduce_pieces([each[at] for each in grads], self.levels, self.view, what, scatter)
        return [found[at] for at in range(len(self.shardings))]


class _Fan(FirstDerivativeOnly):
    """Each parameter, once for each piece; its gradient is the tree over them."""

    what = "a parameter's gradient summed over pieces"

    @staticmethod
    def forward(ctx: Any, uses: _Uses, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.uses = uses
        ctx.set_materialize_grads(False)
        used = [uses.whole(at, parameter) for at, parameter in enumerate(parameters)]
        ctx.like = [(one.shape, one.dtype, one.device) for one in used]
        return tuple([one.view_as(one) for _ in range(uses.count) for one in used])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):  # of a micro-batch that is not the last
            return None, *(None for _ in ctx.like)
        each = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.like * ctx.uses.count)
        ]
        count = len(ctx.like)
        return None, *ctx.uses.summed([each[at : at + count] for at in range(0, len(each), count)])


def rows_of(data: BatchAxis | None, sequence: tuple[int, str] | None = None) -> Cut:
    """The rows of a tensor whose first dim the data parallel axis shards, and whose sequence dim another one does."""
    first = [] if data is None else [data.axis]
    if sequence is None:
        return [(0, first)] if first else []
    dim, axis = sequence
    if dim == 0:
        return [(0, [*first, axis])]
    return [(0, first), (dim, [axis])] if first else [(dim, [axis])]
