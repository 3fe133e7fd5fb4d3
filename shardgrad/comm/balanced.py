"""Axes whose shards differ by one element at most, so that no rank is empty while another has two elements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.agree import agree
from shardgrad.comm.mesh import MeshView, view
from shardgrad.errors import MeshError
from shardgrad.layout.sizes import Balanced

_USED = "sharded already"


@told
def set_balanced(mesh: DeviceMesh, axes: str | Iterable[str] | None = None) -> None:
    """From now on, some axes of this mesh shard 9 elements over 4 ranks as 3, 2, 2, 2; torch.chunk: 3, 3, 3, 0.

        sg.set_balanced(mesh, "tp")  # before the first layer

    It holds for every letter that these axes shard, on every level of a nested split: heads, experts, a vocabulary,
    rows. Sizes that their ranks divide are sharded alike either way. Call it alike on all ranks, before anything is
    built on the mesh; a mesh that is sliced from this one (`mesh["tp"]`) has a setting of its own.

    Args:
        axes: their names; None: all axes of the mesh. Axes that are not named shard as torch.chunk does.

    Raises:
        MeshError: the mesh has no such axis, or layers or products that shard otherwise have been built on it.
        DisagreementError: ranks came with other axes.
    """
    mesh_view = view(mesh)
    names = set(mesh_view.axes if axes is None else [axes] if isinstance(axes, str) else axes)
    mesh_view.require(names, "set_balanced")
    text = f"balanced axes: {', '.join(name for name in mesh_view.axes if name in names) or 'none'}"
    for axis in mesh_view.axes.values():
        agree(mesh_view, axis, lambda: text, "how the axes of the mesh shard")
    changed = [name for name, ranks in mesh_view.shape.items() if isinstance(ranks, Balanced) is not (name in names)]
    if not changed:
        return
    built = mesh_view.settings.get(_USED) or ("a product" if mesh_view.bound else None)
    if built is not None:
        raise MeshError(
            f"set_balanced: axis {changed[0]!r} would shard otherwise than {built} does, which has been built on this "
            "mesh already: set it right after init_device_mesh"
        )
    for name in changed:
        ranks = (Balanced if name in names else int)(mesh_view.shape[name])
        mesh_view.axes[name] = replace(mesh_view.axes[name], size=ranks)
        mesh_view.shape[name] = ranks


def note_sharded(mesh_view: MeshView, what: str) -> None:
    """From now on, the axes of a mesh shard as they do."""
    mesh_view.settings.setdefault(_USED, what)
