"""Into how many pieces each axis cuts what it splits, if exact mode is set on a mesh (`ops.exact` sets it)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm import collectives as raw
from shardgrad.comm import shim
from shardgrad.comm.mesh import MeshView, settings_of_root, view
from shardgrad.comm.tree import TreeAllReduce, TreeReduceScatter, stacked
from shardgrad.errors import LayoutError
from shardgrad.layout.cost import Collective, reduced
from shardgrad.layout.tree import Cut, Level, side_by_side, single, summed, tree_sum

KEY = "exact"
"""Of `MeshView.settings`."""

CHECK = "exact: where tensors come from"  # `ops.origin.check_origin`
_REDUCTIONS = "reductions of pieces"  # of them too


def exact(view: MeshView) -> Mapping[str, int] | None:
    """The pieces of every axis, over all its ranks; None where exact mode is not set.

    Raises:
        LayoutError: it is set on the mesh that this one is a slice of, and not on this one.
    """
    found: Mapping[str, int] | None = view.settings.get(KEY)
    if found is None and view.root is not None and KEY in settings_of_root(view):
        raise LayoutError(
            f"exact mode is set on a mesh of which this one ({', '.join(view.axes)}) is a slice, but not on the slice: "
            "build layers on the mesh itself, or call sg.set_exact on the slice as well"
        )
    return found


def pieces_here(view: MeshView, axis: str) -> int:
    """The pieces of an axis that this rank holds; 1 where exact mode is not set."""
    found = exact(view)
    return 1 if found is None else found[axis] // view.shape[axis]


def refuse_exact(view: MeshView, axes: Sequence[str], what: str, instead: str) -> None:
    """Raise where exact mode is set with several pieces on one of the axes: what is done cannot be exact.

    Raises:
        LayoutError: it is.
    """
    found = exact(view)
    cut = [axis for axis in axes if found is not None and found[axis] > 1]
    if found is not None and cut:
        raise LayoutError(
            f"{what} cannot be exact (sg.set_exact cuts axis {cut[0]!r} into {found[cut[0]]} pieces): {instead}"
        )


@shim.constant
def refuse_exact_on(mesh: DeviceMesh, axes: Sequence[str] | None, what: str, instead: str) -> None:
    """`refuse_exact` on a mesh, also in what torch.compile traces. axes: None for all.

    Raises:
        LayoutError: as `refuse_exact`.
    """
    mesh_view = view(mesh)
    refuse_exact(mesh_view, list(mesh_view.axes) if axes is None else axes, what, instead)


def level_of(view: MeshView, *axes: str) -> Level:
    """The pieces of a sum that is split over axes, minor first, which shard one dim."""
    found = exact(view) or view.shape
    return Level(tuple(Cut(axis, found[axis], view.shape[axis], view.coordinate[axis]) for axis in axes))


def reduce_pieces(
    values: Sequence[Tensor],
    levels: Sequence[Level],
    view: MeshView,
    what: str,
    scatter: Mapping[str, int] | None = None,
) -> Tensor:
    """The sum over all ranks' pieces of what each rank has for each of its own: a tree for each level.

    values: of one shape, which may be changed; the pieces of the last level side by side.
    levels: outermost first. scatter: the dim of which ranks keep their chunks, by the axis; over others, all have all.
    """
    if not levels:
        [value] = values
        return value
    level, *inner = levels
    each = len(values) // level.count
    parts = [reduce_pieces(values[at : at + each], inner, view, what, scatter) for at in range(0, len(values), each)]
    if level.count == 1:
        [total] = parts
    else:
        total = stacked(
            tree_sum(parts, single(level.held()[0], level.count), level.pieces, torch.add), side_by_side(level)
        )
    for reduce in _reductions(level, view, what, scatter or {}):
        total = reduce(total)
    return total


def _reductions(level: Level, view: MeshView, what: str, scatter: Mapping[str, int]) -> list[raw.Collective]:
    """Over each axis of a level with several ranks, minor first; remembered with the mesh."""
    known: dict[object, list[raw.Collective]] = view.settings.setdefault(_REDUCTIONS, {})
    key = level, what, tuple([scatter.get(cut.axis) for cut in level.cuts])
    found = known.get(key)
    if found is None:
        found = known[key] = []
        for cut in level.cuts:
            if cut.ranks > 1:
                how, axis, dim = summed(level, cut.axis), view.axes[cut.axis], scatter.get(cut.axis)
                found.append(TreeAllReduce(axis, how, what) if dim is None else TreeReduceScatter(axis, dim, how, what))
    return found


def adding_in_tree(view: MeshView, width: int) -> list[str]:
    """The axes whose backend adds elements of so many bytes in the tree by itself, where each rank brings one term."""
    return [name for name, axis in view.axes.items() if width >= 4 and axis.backend_adds_in_tree]


def reduce_pieces_collectives(
    phase: str, tensor: str, elements: int, width: int, levels: Sequence[Level], view: MeshView, scatter: bool = False
) -> Iterator[Collective]:
    """Every collective of `reduce_pieces` of tensors of so many elements, of so many bytes each.

    scatter: whether over every axis ranks keep their chunks.
    """
    if not levels:
        return
    level, *inner = levels
    for _ in range(level.count):
        yield from reduce_pieces_collectives(phase, tensor, elements, width, inner, view, scatter)
    for cut in level.cuts:
        if cut.ranks > 1:
            kind, own = "reduce-scatter" if scatter else "all-reduce", cut.axis in adding_in_tree(view, width)
            yield from reduced(phase, kind, tensor, cut.axis, elements, width, summed(level, cut.axis), cut.place, own)
