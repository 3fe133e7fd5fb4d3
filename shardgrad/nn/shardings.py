"""How every parameter of a model is stored, refusing what would pass a shard for a whole tensor."""

from __future__ import annotations

from torch import nn

from shardgrad.arguments import told
from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError, MeshError, ShapeError
from shardgrad.layout.sizes import rule
from shardgrad.nn.data_parallel import differing
from shardgrad.nn.dtensors import group_ranks, is_dtensor
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.sharding import ParamSharding


@told
def named_shardings(model: nn.Module) -> list[tuple[str, nn.Parameter, ParamSharding | None]]:
    """Name, parameter and storage of every parameter; storage is None where no shardgrad layer has it (replicated).

    A parameter that `fully_shard` has made a DTensor over other axes is stored like that as its ranks have it together:
    shards of a shard, where a layer has it, else shards of a whole.

    A parameter that several modules share is listed once, under its first name, and is stored as the shardgrad layer
    that has it says, if one does.

    Raises:
        TypeError: the model is no module, or a parameter is a DTensor that is partial.
        MeshError: a DTensor, as `fully_shard` makes it of a layer's shards, is over ranks that hold different shards.
        ShapeError: a layer's parameter was replaced by something else (parametrized, pruned, of another shape).
        LayoutError: layers that share a parameter store it differently.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a module, not {type(model).__name__}: tensors alone do not say how they are stored. Pass the "
            "model, or the part of it that is meant"
        )
    owned: dict[int, tuple[str, ParamSharding]] = {}
    for path, owner in model.named_modules():
        for name, sharding in owner.shardings().items() if isinstance(owner, ShardedModule) else ():
            parameter = getattr(owner, name)
            if parameter is None:
                continue
            where = f"{path}.{name}" if path else name
            _check(where, parameter, sharding)
            first, other = owned.setdefault(id(parameter), (where, sharding))
            if other is not sharding and _storage(other) != _storage(sharding):
                raise LayoutError(
                    f"{first} and {where} are one parameter, but stored differently: {other.spec} of global shape "
                    f"{other.global_shape} and {sharding.spec} of {sharding.global_shape}"
                )
    found = []
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter) and any(p.is_partial() for p in parameter.placements):  # type: ignore[attr-defined]
            raise TypeError(f"{name} is a DTensor that is partial: a parameter is sharded or replicated")
        known = owned.get(id(parameter))
        found.append((name, parameter, known[1] if known else None))
    return found


def _check(name: str, parameter: object, sharding: ParamSharding) -> None:
    shape = sharding.local_shape
    if not isinstance(parameter, nn.Parameter):
        raise ShapeError(
            f"{name} was a parameter of the layer and is a {type(parameter).__name__} now (parametrized or pruned?): "
            "how it is stored is no longer known"
        )
    for ranks in group_ranks(parameter) if is_dtensor(parameter) else ():
        found = differing(sharding, ranks)
        if found is not None:
            raise MeshError(
                f"{name} is a DTensor (FSDP2?) over ranks {ranks} of a tensor that shardgrad stores as "
                f"{sharding.spec}: along axis {found[0]!r} these hold different shards, which are no parts of one "
                "tensor. Give fully_shard an axis of the mesh that shards no parameter: mesh=mesh['dp']"
            )
    if tuple(parameter.shape) != shape:
        ways = rule(*view(sharding.mesh).shape.values())
        raise ShapeError(
            f"{name} has local shape {tuple(parameter.shape)}, but {sharding.spec} of global shape "
            f"{sharding.global_shape} leaves this rank {shape} ({ways}): copy into the parameter instead of "
            "replacing it"
        )


def _storage(sharding: ParamSharding) -> tuple[object, ...]:
    """What two declarations of one parameter must have in common, whatever their letters."""
    if sharding.parts:
        return sharding.dim, *(_storage(part) for part in sharding.parts)
    ranks = view(sharding.mesh).axes
    return sharding.shape, tuple(tuple(ranks[axis].ranks for axis in dim.axes) for dim in sharding.spec.dims)
