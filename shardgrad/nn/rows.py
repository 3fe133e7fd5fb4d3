"""A parameter as a layer that is no product uses it, whose rows are cut over axes: gathered, or its gradient summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from torch import Tensor

from shardgrad.comm.adjoint import all_gather, replicate
from shardgrad.comm.mesh import view
from shardgrad.layout.cost import Collective, itemsize, sent
from shardgrad.layout.sizes import slab
from shardgrad.nn.module import ParamSharding


def for_rows(parameter: Tensor, sharding: ParamSharding, axes: Sequence[str]) -> Tensor:
    """The parameter for rows that are cut over `axes`, each with its adjoint.

    Over an axis that the parameter is stored cut by, it is gathered, and its gradient reduce-scattered; over one that
    it is marked with (`{dp}`), its gradient is left partial; over any other, its gradient is all-reduced.
    """
    mesh_view = view(sharding.mesh)
    for axis in axes:
        at = _dim(sharding, axis)
        if at is not None:
            whole = slab(sharding.shape[at], sharding.spec.dims[at].axes[:-1], mesh_view.shape, mesh_view.coordinate)[1]
            parameter = all_gather(parameter, sharding.mesh, axis, at, size=whole)
        elif axis not in sharding.spec.grad_partial:
            parameter = replicate(parameter, sharding.mesh, axis)
    return parameter


def for_rows_collectives(
    sharding: ParamSharding, axes: Sequence[str], dtype: Any, count: int = 1
) -> Iterator[Collective]:
    """What `for_rows` sends, forward and backward.

    count: how many parameters, stored alike, go together.
    """
    mesh_view = view(sharding.mesh)
    shape = list(sharding.block()[1])
    gathers = []
    for axis in axes:
        at = _dim(sharding, axis)
        if at is not None:
            whole = slab(sharding.shape[at], sharding.spec.dims[at].axes[:-1], mesh_view.shape, mesh_view.coordinate)[1]
            ranks = mesh_view.shape[axis]
            shape[at] = -(-whole // ranks)
            yield from one(sharding, "forward", "all-gather", "W", axis, prod(shape), dtype)
            shape[at] *= ranks
            gathers.append((axis, prod(shape)))
            shape[at] = whole
        elif axis not in sharding.spec.grad_partial:
            yield from one(sharding, "dW", "all-reduce", "dW", axis, count * prod(shape), dtype)
    for axis, elements in gathers:
        yield from one(sharding, "dW", "reduce-scatter", "dW", axis, elements, dtype)


def one(
    sharding: ParamSharding, phase: str, operation: str, tensor: str, axis_name: str, elements: int, dtype: Any
) -> Iterator[Collective]:
    """One collective of a tensor that has so many elements where it is handed over; none on an axis of one rank."""
    axis = view(sharding.mesh).axis(axis_name)
    if axis.size > 1 and elements:
        count = sent(operation, elements, axis.size, axis.index) * itemsize(dtype)
        yield Collective(phase, operation, tensor, axis_name, count)


def _dim(sharding: ParamSharding, axis: str) -> int | None:
    return next((at for at, dim in enumerate(sharding.spec.dims) if axis in dim.axes), None)
