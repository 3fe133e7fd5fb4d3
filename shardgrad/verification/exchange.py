"""Tensors and numbers of every rank of a mesh, on every rank, in the mesh's row-major order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm.collectives import AllGather, AllReduce, gather_ints
from shardgrad.comm.mesh import MeshView

_WHAT = "verification"
_DIMS = 16
_AT_ONCE = 1 << 22
"""Elements that are added up in one exchange."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


def coordinates(mesh: MeshView) -> tuple[dict[str, int], ...]:
    """Each rank's index on every axis."""
    return tuple(dict(zip(mesh.shape, at)) for at in product(*map(range, mesh.shape.values())))


def place(mesh: MeshView) -> int:
    """This rank's place in that order."""
    return coordinates(mesh).index(mesh.coordinate)


def ints_of_all(values: list[int], mesh: MeshView) -> list[list[int]]:
    """Every rank's integers, as many on each."""
    count = len(values)
    for axis in reversed(mesh.axes.values()):
        values = [value for row in gather_ints(values, axis, mesh.device, _WHAT) for value in row]
    return [values[at : at + count] for at in range(0, len(values), count)]


def same_shape_of_all(local: Tensor, mesh: MeshView) -> Tensor:
    """Every rank's tensor, of one shape and dtype: [ranks, ...]."""
    full = local.contiguous().view(-1).view(torch.uint8).to(mesh.device)
    if not full.numel():
        return local.new_empty((prod(mesh.shape.values()), *local.shape))
    for axis in reversed(mesh.axes.values()):
        full = AllGather(axis, 0, full.numel() * axis.size, _WHAT)(full)
    return full.clone().view(local.dtype).view(-1, *local.shape)


def tensors_of_all(local: Tensor | None, mesh: MeshView) -> list[Tensor | None]:
    """Every rank's tensor, whatever its shape and dtype; None where the rank has none."""
    header = [-1] * (_DIMS + 2)
    if local is not None:
        local = local.detach().contiguous()
        header = [_DTYPES.index(local.dtype), local.dim(), *local.shape, *[0] * (_DIMS - local.dim())]
    headers = ints_of_all(header, mesh)
    shapes = [row[2 : 2 + row[1]] if row[0] >= 0 else [0] for row in headers]
    sizes = [prod(shape) * _DTYPES[max(row[0], 0)].itemsize for shape, row in zip(shapes, headers)]
    mine = torch.zeros(max(sizes), dtype=torch.uint8, device=mesh.device)
    if local is not None and local.numel():
        mine[: local.numel() * local.element_size()] = local.view(-1).view(torch.uint8)
    everyones = same_shape_of_all(mine, mesh)
    return [
        None if row[0] < 0 else bits[:size].clone().view(_DTYPES[row[0]]).view(shape)
        for row, shape, size, bits in zip(headers, shapes, sizes, everyones)
    ]


def from_first(tensor: Tensor, mesh: MeshView) -> Tensor:
    """The first rank's tensor, on every rank; each gives one of its shape and dtype."""
    return sum_over(tensor if place(mesh) == 0 else torch.zeros_like(tensor), mesh, mesh.axes)


def sum_over(tensor: Tensor, mesh: MeshView, axes: Iterable[str]) -> Tensor:
    """The sum of the ranks' tensors over some axes."""
    total = tensor.detach().clone()
    for name in axes:
        if mesh.shape[name] > 1:
            total = AllReduce(mesh.axes[name], _WHAT)(total)
    return total


def sums_of_all(tensors: Sequence[Tensor], mesh: MeshView) -> list[Tensor]:
    """Of each of these float64 tensors, which every rank has in these shapes, the sum over all ranks."""
    sizes = [tensor.numel() for tensor in tensors]
    if prod(mesh.shape.values()) == 1 or not sum(sizes):
        return list(tensors)
    found: list[Tensor] = []
    group: list[Tensor] = []
    for at, tensor in enumerate(tensors):
        group.append(tensor)
        if at + 1 == len(tensors) or sum(one.numel() for one in group) > _AT_ONCE:
            flat = sum_over(torch.cat([one.reshape(-1) for one in group]).to(mesh.device), mesh, mesh.axes)
            parts = flat.split([one.numel() for one in group])
            found += [part.view(one.shape) for part, one in zip(parts, group)]
            group = []
    return found


def any_of_all(mine: Collection[Any], known: Sequence[Any], mesh: MeshView) -> set[Any]:
    """Those of `known` that some rank has."""
    rows = ints_of_all([int(one in mine) for one in known], mesh)
    return {one for one, held in zip(known, zip(*rows)) if any(held)}
