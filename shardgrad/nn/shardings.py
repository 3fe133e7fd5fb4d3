"""How every parameter of a model is stored, refusing what would pass a shard for a whole tensor."""

from __future__ import annotations

from torch import nn

from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.sharding import ParamSharding


def named_shardings(model: nn.Module) -> list[tuple[str, nn.Parameter, ParamSharding | None]]:
    """Name, parameter and storage of every parameter; storage is None where no shardgrad layer has it (replicated).

    A parameter that several modules share is listed once, under its first name, and is stored as the shardgrad layer
    that has it says, if one does.

    Raises:
        TypeError: the model is no module, or a parameter is a DTensor.
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
        if hasattr(parameter, "to_local"):
            raise TypeError(f"{name} is a DTensor: torch's own functions know how it is stored, shardgrad does not")
        known = owned.get(id(parameter))
        found.append((name, parameter, known[1] if known else None))
    return found


def _check(name: str, parameter: object, sharding: ParamSharding) -> None:
    shape = sharding.local_shape
    if hasattr(parameter, "to_local"):
        raise TypeError(
            f"{name} is a DTensor (FSDP2?) of a tensor that shardgrad stores as {sharding.spec}: what is global over "
            "both is not known here. Use DDP, or write the second axis into the layout of sg.matmul (W[d/dp,m/tp])"
        )
    if not isinstance(parameter, nn.Parameter):
        raise ShapeError(
            f"{name} was a parameter of the layer and is a {type(parameter).__name__} now (parametrized or pruned?): "
            "how it is stored is no longer known"
        )
    if tuple(parameter.shape) != shape:
        raise ShapeError(
            f"{name} has local shape {tuple(parameter.shape)}, but {sharding.spec} of global shape "
            f"{sharding.global_shape} leaves this rank {shape} (torch.chunk): copy into the parameter instead of replacing it"
        )


def _storage(sharding: ParamSharding) -> tuple[object, ...]:
    """What two declarations of one parameter must have in common, whatever their letters."""
    ranks = view(sharding.mesh).axes
    return sharding.shape, tuple(tuple(ranks[axis].ranks for axis in dim.axes) for dim in sharding.spec.dims)
