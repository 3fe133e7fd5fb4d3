"""Parameters that ranks use for different rows or heads: gathered where they are stored sharded, and their gradients
summed, those of several in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm import shim
from shardgrad.comm.adjoint import all_gather, along, replicate
from shardgrad.comm.mesh import Axis, axis_on, view
from shardgrad.comm.pieces import refuse_exact_on
from shardgrad.layout.cost import Collective, itemsize, sent
from shardgrad.layout.sizes import slab
from shardgrad.nn.sharding import ParamSharding


def for_rows(parameters: Sequence[Tensor], shardings: Sequence[ParamSharding], axes: Sequence[str]) -> list[Tensor]:
    """Parameters of one dtype as ranks use them that hold different rows over `axes`, each with its adjoint.

    Over an axis that shards a parameter, it is gathered, and its gradient reduce-scattered; over one that it is marked
    with (`{dp}`), its gradient is left partial; over any other, its gradient is all-reduced, in one all-reduce with
    those of the others.
    """
    made = list(parameters)
    if shardings:
        refuse_exact_on(shardings[0].mesh, axes, "the use of a parameter for different rows", "use another layer")
    for axis in axes:
        alike = []
        for at, sharding in enumerate(shardings):
            dim = dim_over(sharding, axis)
            if dim is not None:
                size = size_before(sharding, dim)
                made[at] = all_gather(made[at], sharding.mesh, axis, dim, size=size)
            elif axis not in sharding.spec.grad_partial:
                alike.append(at)
        summed = _replicate([made[at] for at in alike], shardings[0].mesh, axis) if alike else []
        for at, parameter in zip(alike, summed):
            made[at] = parameter
    return made


def for_rows_collectives(
    name: str, shardings: Sequence[ParamSharding], axes: Sequence[str], dtype: Any
) -> Iterator[Collective]:
    """What `for_rows` sends in forward and backward, every parameter trained.

    name: of the gradients that are summed.
    """
    shapes = [list(sharding.block()[1]) for sharding in shardings]
    scattered = []
    for axis in axes:
        elements = 0
        for sharding, shape in zip(shardings, shapes):
            dim = dim_over(sharding, axis)
            if dim is not None:
                size, ranks = size_before(sharding, dim), view(sharding.mesh).shape[axis]
                shape[dim] = -(-size // ranks)
                yield from one(sharding.mesh, "forward", "all-gather", "W", axis, prod(shape), dtype)
                shape[dim] *= ranks
                scattered.append((axis, prod(shape)))
                shape[dim] = size
            elif axis not in sharding.spec.grad_partial:
                elements += prod(shape)
        if shardings:
            yield from one(shardings[0].mesh, "dW", "all-reduce", name, axis, elements, dtype)
    for axis, elements in scattered:
        yield from one(shardings[0].mesh, "dW", "reduce-scatter", "dW", axis, elements, dtype)


def one(
    mesh: DeviceMesh, phase: str, operation: str, tensor: str, axis_name: str, elements: int, dtype: Any
) -> Iterator[Collective]:
    """One collective of a tensor that has so many elements where it is handed over; none on an axis of one rank."""
    axis = view(mesh).axis(axis_name)
    if axis.size > 1 and elements:
        count = sent(operation, elements, axis.size, axis.index) * itemsize(dtype)
        yield Collective(phase, operation, tensor, axis_name, count)


def _replicate(parameters: Sequence[Tensor], mesh: DeviceMesh, axis: str) -> list[Tensor]:
    """`replicate` of several tensors of one dtype, whose gradients are summed in a single all-reduce.

    Tensors that need no gradient pass as they are, and are not reduced.
    """
    if shim.beyond_backward():
        return [replicate(p, mesh, axis) for p in parameters]
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if len(trained) < 2:
        return [replicate(p, mesh, axis) if trained and p is trained[0] else p for p in parameters]
    if torch.compiler.is_compiling():
        flat = replicate(torch.cat([p.reshape(-1) for p in trained]), mesh, axis)
        parts = iter([part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in trained]), trained)])
    else:
        over = axis_on(mesh, axis)
        if over.size == 1:
            return list(parameters)
        parts = iter(_Together.apply(over, *trained))
    return [next(parts) if p.requires_grad else p for p in parameters]


class _Together(torch.autograd.Function):
    """The tensors themselves, of which backward keeps no copy; their gradients side by side in one all-reduce."""

    @staticmethod
    def forward(ctx: Any, over: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.over = over
        return tuple([tensor.view_as(tensor) for tensor in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = along("all_reduce", torch.cat([grad.reshape(-1) for grad in grads]), ctx.over)
        return None, *(part.view(g.shape) for part, g in zip(flat.split([g.numel() for g in grads]), grads))


def size_before(sharding: ParamSharding, dim: int) -> int:
    """The size of a dim, as it is before the last of its axes shards it."""
    mesh_view, axes = view(sharding.mesh), sharding.spec.dims[dim].axes[:-1]
    return slab(sharding.shape[dim], axes, mesh_view.shape, mesh_view.coordinate)[1]


def dim_over(sharding: ParamSharding, axis: str) -> int | None:
    return next((at for at, dim in enumerate(sharding.spec.dims) if axis in dim.axes), None)
