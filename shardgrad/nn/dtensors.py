"""Parameters that torch shards beside shardgrad: DTensors, as `fully_shard` makes them of every parameter, over the
axes of data parallelism."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.layout.sizes import slab
from shardgrad.nn.sharding import ParamSharding

Place = tuple[MeshView, Axis]


def is_dtensor(x: object) -> bool:
    """Whether it is a DTensor; asked without importing them."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """What this rank has of a DTensor, of the same memory; any other tensor as it is."""
    made: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return made


def whole(x: Tensor) -> Tensor:
    """The tensor of which a DTensor's ranks have parts, on every rank of its mesh; any other tensor as it is."""
    made: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return made


def placed_like(full: Tensor, x: Tensor) -> Tensor:
    """A tensor, alike on every rank, as a DTensor placed as `x` is; where `x` is none, as it is. No communication."""
    if not is_dtensor(x):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(x, DTensor)
    made: Tensor = distribute_tensor(full.detach(), x.device_mesh, x.placements, src_data_rank=None)
    return made.clone()


def sharding_places(x: Tensor) -> list[Place]:
    """The axes of more than one rank over which a DTensor is in shards; none of any other tensor."""
    if not is_dtensor(x):
        return []
    dtensor: Any = x
    mesh_view = view(dtensor.device_mesh)
    axes = zip(mesh_view.axes.values(), dtensor.placements)
    return [(mesh_view, axis) for axis, placement in axes if placement.is_shard() and axis.size > 1]


def group_ranks(x: Tensor) -> Iterator[list[int]]:
    """This rank's peers along each axis of a DTensor's mesh, which may have no names."""
    mesh: Any = x.device_mesh  # type: ignore[attr-defined]
    for dim in range(mesh.ndim):
        yield dist.get_process_group_ranks(mesh.get_group(dim))


def pieces(x: Tensor, sharding: ParamSharding | None) -> list[tuple[Tensor, ParamSharding | None]]:
    """What this rank has of a parameter, or of its gradient, each with how shardgrad stores it.

    A concatenation of which a DTensor has a part is filled up with zeros: the part may end within one of its own parts.
    """
    if sharding is None or not sharding.parts:
        return [(local(x), sharding)]
    return list(sharding.pieces(_filled_up(x) if is_dtensor(x) else x))


def _filled_up(x: Any) -> Tensor:
    made = torch.zeros(x.shape, dtype=x.dtype, device=x.to_local().device)
    mesh_view, part = view(x.device_mesh), made
    ranks = {axis: int(size) for axis, size in mesh_view.shape.items()}  # a DTensor's shards are torch.chunk's
    for dim, size in enumerate(x.shape):
        axes = [axis for axis, placement in zip(mesh_view.axes, x.placements) if placement.is_shard(dim)]
        part = part.narrow(dim, *slab(size, axes, ranks, mesh_view.coordinate))
    part.copy_(x.to_local())
    return made


def reshard(model: nn.Module) -> None:
    """Have `fully_shard` put its DTensors back for the parameters that it left gathered after a forward: these are what
    the optimizer knows, and what is written to them lasts."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # without it there is none
    for module in model.modules() if fsdp is not None and isinstance(model, nn.Module) else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
