"""Parameters that have several names: sharded under all of them, or under none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from shardgrad.errors import LayoutError
from shardgrad.models.plan import is_conv1d
from shardgrad.nn.module import ShardedModule

Place = tuple[str, str]  # the name of a module, and of its parameter


def tied(model: nn.Module) -> list[list[Place]]:
    """The places of each parameter that stands in several."""
    found: dict[int, list[Place]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((name, own))
    return [places for places in found.values() if len(places) > 1]


def check(groups: list[list[Place]], made: Mapping[str, ShardedModule], model: nn.Module) -> None:
    """Refuse a parameter that is sharded under some of its names, or in two ways.

    made: the sharded modules by the names of those that they stand for.

    Raises:
        LayoutError: as said.
    """
    for places in groups:
        new = [(name, own, made[name].shardings()[own]) for name, own in places if name in made]
        if not new:
            continue
        others = [(name, own) for name, own in places if name not in made and _computes(model.get_submodule(name))]
        name, own, sharding = new[0]
        if others and sharding.spec.axes:
            raise LayoutError(
                f"{name}.{own} and {others[0][0]}.{others[0][1]} are one parameter, of which the plan shards the first "
                "only: give both an entry, or neither"
            )
        for other, other_own, second in new[1:]:
            same = [dim.axes for dim in sharding.spec.dims] == [dim.axes for dim in second.spec.dims]
            if not same or sharding.shape != second.shape or sharding.merged != second.merged:
                raise LayoutError(
                    f"{name}.{own} and {other}.{other_own} are one parameter, which the plan stores as {sharding.spec} "
                    f"and as {second.spec}"
                )


def _computes(module: nn.Module) -> bool:
    """Whether a module computes with its parameters itself (a bare parameter may be another's name only)."""
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)


def join(groups: list[list[Place]], made: Mapping[str, ShardedModule], model: nn.Module) -> None:
    """Make what was one parameter one again."""
    for places in groups:
        first = next(((name, own) for name, own in places if name in made), None)
        if first is not None:
            parameter = getattr(model.get_submodule(first[0]), first[1])
            for name, own in places:
                setattr(model.get_submodule(name), own, parameter)
