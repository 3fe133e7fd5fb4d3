"""A model's state as one device would hold it, whatever the mesh: global tensors, or DTensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shardgrad.arguments import told
from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError
from shardgrad.layout.sizes import chunks, is_torch_chunk
from shardgrad.nn.dtensors import is_dtensor, placed_like, reshard, whole
from shardgrad.nn.sharding import ParamSharding
from shardgrad.nn.shardings import named_shardings

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

_PART = ".part"


@told
@torch.no_grad()
def state_dict(
    model: nn.Module, *, as_dtensor: bool = False, device: torch.device | str | None = None
) -> MutableMapping[str, Any]:
    """`model.state_dict()` with global tensors: the same, bit for bit, for every mesh; called on every rank.

    Parameters are gathered one at a time. Buffers are taken as this rank holds them. The result shares no memory with
    the model; a parameter of several names is one tensor under all of them.

    Args:
        model: the model; names are those of `model.state_dict()`.
        as_dtensor: leave parameters in shards, as DTensors around the model's own memory (what is written to one, by
            torch.distributed.checkpoint say, is written to the model). No communication. Parameters that no shardgrad
            layer owns, and buffers, stay the tensors they are. Of a concatenation, each part is an entry, `name.part0`,
            `name.part1`, …, which `load_state_dict` takes as well.
        device: where each global tensor goes as soon as it is gathered: "cpu" for a model that does not fit on one
            device as a whole.

    Raises:
        ValueError: `device` is given with `as_dtensor`, a parameter is on the meta device, or a hook of the model's has
            changed a sharded parameter, so that it would pass for a whole one.
        LayoutError: with `as_dtensor`, a parameter is stored as no DTensor can say: over axes in another order than the
            mesh has them, or in balanced shards that are not torch.chunk's as well.
        TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
    """
    if as_dtensor and device is not None:
        raise ValueError("device is for global tensors: a DTensor stays where the model is")
    live, storage = _live(model)
    made: dict[int, Any] = {}
    for name, value in list(live.items()):
        if not isinstance(value, Tensor):
            continue
        sharding = storage.get(id(value))
        if as_dtensor and sharding is not None and sharding.parts and not is_dtensor(value):
            for at, (piece, part) in enumerate(sharding.pieces(value.detach())):
                live[f"{name}{_PART}{at}"] = _as_dtensor(piece, name, part)
            del live[name]
            continue
        if id(value) not in made:
            made[id(value)] = _as_dtensor(value, name, sharding) if as_dtensor else _whole(value, sharding, device)
        live[name] = made[id(value)]
    return live


@told
@torch.no_grad()
def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Fill a model, on any mesh, with a global state: `model.load_state_dict(state)` whose tensors are global.

    Each rank copies its shard into place; nothing is communicated, except for a DTensor stored
    otherwise than the parameter, which is gathered (then all ranks of its mesh must come, with the same state).

    Args:
        model: the model.
        state: global tensors or DTensors by the names of `model.state_dict()`: all of them and no others (to load
            some, `{**sg.state_dict(model), **some}`). Of the names that share a parameter, one is enough. Dtypes are
            converted.

    Raises:
        ValueError: names are missing or unknown, shapes differ, or names that share a parameter have different values:
            all that is wrong is listed, and nothing has been changed. Or a parameter is on the meta device.
        TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
    """
    live, storage = _live(model)
    state = _joined(state, live, storage)
    names: dict[int, list[str]] = {}
    for name, value in live.items():
        if _is_tensor(name, value):
            names.setdefault(id(value), []).append(name)
    sources = {
        name: next((other for other in names.get(id(value), [name]) if other in state), None)
        for name, value in live.items()
    }

    wrong = [f"missing: {name}" for name, source in sources.items() if source is None]
    wrong += [f"unknown: {name}" for name in state if name not in live]
    for name, source in sources.items():
        if source is not None and _is_tensor(name, live[name]):
            wrong += _misfit(name, live[name], storage.get(id(live[name])), state, source)
    if wrong:
        raise ValueError(
            f"the state is not that of this {type(model).__name__}, which has not been changed:\n  "
            + "\n  ".join(wrong)
        )

    local: OrderedDict[str, Any] = OrderedDict()
    local.update((name, state[source]) for name, source in sources.items() if source is not None)
    for shared in names.values():
        value = live[shared[0]]
        part = placed_like(_part(local[shared[0]], storage.get(id(value))), value)
        local.update(dict.fromkeys(shared, part))
    if hasattr(state, "_metadata"):  # the versions of modules, which torch hangs on the mapping
        local._metadata = state._metadata  # type: ignore[attr-defined]
    model.load_state_dict(local)


def _live(model: nn.Module) -> tuple[MutableMapping[str, Any], dict[int, ParamSharding]]:
    """torch's state of a model with its own tensors in it, and how each of them, by identity, is stored."""
    reshard(model)
    parameters = named_shardings(model)
    live: MutableMapping[str, Any] = model.state_dict(keep_vars=True)
    there = {id(value) for value in live.values()}
    for name, parameter, sharding in parameters:
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values: model.to_empty(device=…) makes room")
        if sharding is not None and id(parameter) not in there:
            raise ValueError(
                f"{name} is not in model.state_dict() as the parameter it is: a state_dict hook has changed it, so how "
                "it is stored is no longer known"
            )
    return live, {id(parameter): sharding for _, parameter, sharding in parameters if sharding is not None}


def _joined(
    state: Mapping[str, Any], live: Mapping[str, Any], storage: Mapping[int, ParamSharding]
) -> Mapping[str, Any]:
    """A state in which the parts of a concatenation are one tensor again."""
    made: OrderedDict[str, Any] = OrderedDict(state)
    if hasattr(state, "_metadata"):
        made._metadata = state._metadata  # type: ignore[attr-defined]
    for name, value in live.items():
        sharding = storage.get(id(value))
        names = [f"{name}{_PART}{at}" for at in range(len(sharding.parts) if sharding is not None else 0)]
        if sharding is not None and names and name not in state and all(one in state for one in names):
            whole_parts = [whole(made.pop(one)).reshape(part.global_shape) for one, part in zip(names, sharding.parts)]
            made[name] = torch.cat(whole_parts, sharding.dim)
    return made


def _is_tensor(name: str, value: object) -> bool:
    """Whether an entry is a parameter or a buffer, not what a module's get_extra_state made of itself."""
    return isinstance(value, Tensor) and name.rpartition(".")[2] != "_extra_state"


def _whole(value: Tensor, sharding: ParamSharding | None, device: torch.device | str | None) -> Tensor:
    part = whole(value.detach())
    full = part if sharding is None else sharding.unshard(part)
    moved = full if device is None else full.to(device)
    return moved.clone() if sharding is None and moved is full else moved


def _as_dtensor(value: Tensor, name: str, sharding: ParamSharding | None) -> Tensor:
    if sharding is None:
        return value.detach()
    if is_dtensor(value):
        raise LayoutError(
            f"{name} is in shards of a shard (FSDP2), which no DTensor can say: take global tensors (as_dtensor=False)"
        )
    from torch.distributed.tensor import DTensor  # a second of imports, only where it is needed

    placements = _placements(sharding)
    if placements is None and _in_order(sharding):
        raise LayoutError(
            f"{name} is stored as {sharding.spec} of global shape {sharding.shape}, in balanced shards "
            "(sg.set_balanced), and a DTensor's are torch.chunk's: take global tensors (as_dtensor=False), or a size "
            "that the ranks divide"
        )
    if placements is None:
        raise LayoutError(
            f"{name} is stored as {sharding.spec}: a DTensor shards a dim over the axes of its mesh in the mesh's "
            f"order ({', '.join(view(sharding.mesh).shape)}). Name the axes of the mesh in the order of the layout, or "
            "take global tensors (as_dtensor=False)"
        )
    stride = tuple(prod(sharding.shape[at + 1 :]) for at in range(len(sharding.shape)))
    return DTensor.from_local(
        value.detach().reshape(sharding.block()[1]),
        sharding.mesh,
        placements,
        run_check=False,
        shape=torch.Size(sharding.shape),
        stride=stride,
    )


def _placements(sharding: ParamSharding) -> list[Placement] | None:
    """The storage as DTensor's placements, one for each axis of the mesh; None if they cannot say it."""
    from torch.distributed.tensor import Replicate, Shard

    order = list(view(sharding.mesh).shape)
    placements: list[Placement] = [Replicate() for _ in order]
    if not _in_order(sharding) or not _in_torch_chunks(sharding):
        return None
    for at, dim in enumerate(sharding.spec.dims):
        for axis in dim.axes:
            placements[order.index(axis)] = Shard(at)
    return placements


def _in_order(sharding: ParamSharding) -> bool:
    """Whether axes shard every dim in the order that the mesh has them."""
    sizes = view(sharding.mesh).shape
    order = list(sizes)
    places = [[order.index(axis) for axis in dim.axes if sizes[axis] > 1] for dim in sharding.spec.dims]
    return all(some == sorted(some) for some in places)


def _in_torch_chunks(sharding: ParamSharding) -> bool:
    """Whether every rank has what torch.chunk gives it: the same on all ranks."""
    ranks = view(sharding.mesh).shape
    for size, dim in zip(sharding.shape, sharding.spec.dims):
        sizes = {size}
        for axis in dim.axes:
            if not all(is_torch_chunk(one, ranks[axis]) for one in sizes):
                return False
            sizes = {length for one in sizes for length in chunks(one, ranks[axis])}
    return True


def _misfit(
    name: str, value: Tensor, sharding: ParamSharding | None, state: Mapping[str, Any], source: str
) -> list[str]:
    given, wanted = state[source], tuple(value.shape) if sharding is None else sharding.global_shape
    if sharding is not None and hasattr(given, "to_local"):
        wanted = sharding.shape  # a DTensor has the dims that axes shard
    if not isinstance(given, Tensor):
        return [f"{name}: a {type(given).__name__}, not a tensor"]
    if tuple(given.shape) != wanted:
        hint = " (this rank's shard: a state is global)" if tuple(given.shape) == tuple(value.shape) else ""
        return [f"{name}: global shape {wanted} in the model, {tuple(given.shape)} in the state{hint}"]
    other = state.get(name, given)
    if other is given or not isinstance(other, Tensor) or hasattr(given, "to_local") or hasattr(other, "to_local"):
        return []
    alike = torch.equal(other.to(given), given)
    return [] if alike else [f"{name}: shared with {source}, but the state has other values there"]


def _part(given: Tensor, sharding: ParamSharding | None) -> Tensor:
    """What shardgrad stores on this rank of a global tensor, or of a DTensor."""
    if hasattr(given, "to_local"):
        from torch.distributed.tensor import DTensor

        assert isinstance(given, DTensor)
        if (
            sharding is not None
            and not sharding.parts
            and given.device_mesh == sharding.mesh
            and list(given.placements) == _placements(sharding)
        ):
            return given.to_local().reshape(sharding.local_shape)
        given = given.full_tensor()
    return given if sharding is None else sharding.shard(given)
