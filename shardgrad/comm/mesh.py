"""What shardgrad needs of a DeviceMesh, looked up once: each axis with its group, and what is cached for the mesh."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm import shim
from shardgrad.comm.standing import Standing, standing_in
from shardgrad.errors import MeshError, shorten


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a mesh as this rank sees it: its peers along the axis, and its place among them.

    mesh: the handle of the mesh's view.
    standing: how far this rank has come in the group.
    backend: what the group calls, without PyTorch's dispatcher.
    """

    name: str
    size: int
    index: int
    group: dist.ProcessGroup = field(repr=False)
    ranks: tuple[int, ...]
    mesh: str = field(compare=False)
    standing: Standing = field(compare=False, repr=False)
    backend: Any = field(compare=False, repr=False)

    @property
    def backend_adds_in_tree(self) -> bool:
        """Whether the backend adds float32 and float64 of its ranks in the tree of exact mode."""
        return bool(getattr(self.backend, "adds_in_tree", False))

    def __str__(self) -> str:
        return f"axis {self.name!r} (ranks {', '.join(map(str, self.ranks))})"


@dataclass(frozen=True, slots=True, weakref_slot=True)
class MeshView:
    """A mesh as this rank sees it.

    shape, coordinate: ranks along each axis, and this rank's index.
    handle: a name by which compiled graphs, which hold no objects, refer to the mesh; one for each view.
    bound, settings: the products bound to this mesh, and how they run; kept by other rooms, and lost with the mesh.
    agreed: per axis, the descriptions on which its ranks have agreed (see `agree`).
    root: the mesh that this one is a slice of, `mesh["tp"]`; None of one that is none.
    """

    axes: dict[str, Axis]
    device: torch.device
    shape: dict[str, int]
    coordinate: dict[str, int]
    handle: str = ""
    bound: dict[Any, Any] = field(default_factory=dict, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    agreed: dict[str, set[str]] = field(default_factory=dict, repr=False)
    root: weakref.ref[DeviceMesh] | None = field(default=None, repr=False)

    def axis(self, name: str, user: object = None) -> Axis:
        """One axis.

        Raises:
            MeshError: the mesh has no such axis.
        """
        try:
            return self.axes[name]
        except KeyError:
            of = f" of {shorten(str(user))}" if user is not None else ""
            have = ", ".join(f"{axis}={size}" for axis, size in self.shape.items())
            raise MeshError(
                f"the mesh has no axis {shorten(repr(name))}{of}: it has {have}. Use one of these, or "
                f"init_device_mesh(…, mesh_dim_names=(…, {shorten(repr(name))}, …))"
            ) from None

    def require(self, names: Iterable[str], user: object) -> None:
        for name in names:
            self.axis(name, user)


# By identity: equal meshes may hold different process groups (after destroy_process_group and a new start).
_views: dict[int, tuple[weakref.ref[DeviceMesh], MeshView]] = {}
_by_handle: weakref.WeakValueDictionary[str, MeshView] = weakref.WeakValueDictionary()
_numbers = count()


@shim.constant
def view(mesh: DeviceMesh) -> MeshView:
    """The mesh's view, made at first use and dropped with the mesh.

    Raises:
        MeshError: not a DeviceMesh, its axes have no names, or this rank is not part of it.
    """
    found = _views.get(id(mesh))
    if found is not None and found[0]() is mesh:
        return found[1]
    if shim.real_mesh(mesh) is not mesh:
        return view(shim.real_mesh(mesh))
    made = _view(mesh)
    _by_handle[made.handle] = made
    key = id(mesh)
    _views[key] = (weakref.ref(mesh, lambda _: _views.pop(key, None)), made)
    return made


def settings_of_root(mesh_view: MeshView) -> dict[str, Any]:
    """The settings of the mesh that a mesh is a slice of; empty if it is none, or nothing was done on that yet."""
    root = None if mesh_view.root is None else mesh_view.root()
    found = None if root is None else _views.get(id(root))
    return found[1].settings if found is not None and found[0]() is root else {}


def slices_of(mesh: DeviceMesh) -> list[MeshView]:
    """The views of slices of a mesh, as far as something was done on them."""
    return [view for _, view in _views.values() if view.root is not None and view.root() is mesh]


def _view(mesh: DeviceMesh) -> MeshView:
    if not isinstance(mesh, DeviceMesh):
        raise MeshError(
            f"mesh must be a torch DeviceMesh, not {type(mesh).__name__}: make one with "
            "torch.distributed.init_device_mesh('cpu', (2,), mesh_dim_names=('tp',))"
        )
    names = mesh.mesh_dim_names
    if not names:
        raise MeshError(
            "the axes of the mesh have no names: pass mesh_dim_names=('tp',) (or as many as it has) to init_device_mesh"
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise MeshError(f"rank {dist.get_rank()} is not part of the mesh {mesh}")
    places = ",".join(f"{name}={coordinate[dim]}/{mesh.size(dim)}" for dim, name in enumerate(names))
    handle = f"{places} #{next(_numbers)}"
    root = shim.root_of(mesh)
    kind = mesh.device_type
    device = (
        torch.device(kind, torch.get_device_module(kind).current_device()) if kind != "cpu" else torch.device("cpu")
    )
    axes = {}
    for dim, name in enumerate(names):
        group = mesh.get_group(name)
        ranks = tuple(dist.get_process_group_ranks(group))
        if ranks[coordinate[dim]] != dist.get_rank():
            raise MeshError(
                f"the mesh lists its ranks out of order along axis {name!r}: torch sorts a group's ranks, {ranks}, so "
                f"rank {dist.get_rank()}, at place {coordinate[dim]} of the mesh, would get another rank's shard. Let "
                "ranks ascend along every axis"
            )
        backend = shim.backend(group, device)
        axes[name] = Axis(name, mesh.size(dim), coordinate[dim], group, ranks, handle, standing_in(group), backend)
        _axis_names[group] = name
    return MeshView(
        axes,
        device,
        shape={name: axis.size for name, axis in axes.items()},
        coordinate={name: axis.index for name, axis in axes.items()},
        handle=handle,
        agreed={name: set() for name in axes},
        root=None if root is mesh else weakref.ref(root),
    )


def view_of(axis: Axis) -> MeshView:
    """The view that an axis is of."""
    return _by_handle[axis.mesh]


def mesh_of_all(device_type: str) -> DeviceMesh | None:
    """All ranks as one axis, over the group that they already have; None in a process that is no rank."""
    if not dist.is_initialized():
        return None
    return DeviceMesh(device_type, list(range(dist.get_world_size())), mesh_dim_names=("all",))


@shim.constant
def axis_on(mesh: DeviceMesh, name: str, user: object = None) -> Axis:
    """One axis of a mesh, as `MeshView.axis`, which torch.compile does not look into."""
    return view(mesh).axis(name, user)


def axis_of(handle: str, name: str) -> Axis:
    """One axis of the mesh that a compiled graph refers to.

    Raises:
        MeshError: the mesh that the graph was compiled for is gone.
    """
    found = _by_handle.get(handle)
    if found is None:
        raise MeshError(f"this graph was compiled for a mesh that is gone ({handle}): torch.compiler.reset()")
    return found.axes[name]


_axis_names: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()


def axis_name(group: dist.ProcessGroup) -> str:
    """The mesh axis that a group was last seen as, or the group's own description."""
    return _axis_names.get(group) or group.group_desc or group.group_name
