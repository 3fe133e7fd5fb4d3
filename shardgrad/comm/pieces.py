"""Into how many pieces each axis cuts what it splits, if exact mode is set on a mesh (`ops.exact` sets it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from shardgrad.comm.mesh import MeshView
from shardgrad.comm.tree import TreeAllReduce, TreeReduceScatter, add, stacked
from shardgrad.errors import LayoutError
from shardgrad.layout.tree import Cut, Level, held, single, summed, tree_sum

KEY = "exact"
"""Of `MeshView.settings`."""


def exact(view: MeshView) -> Mapping[str, int] | None:
    """The pieces of every axis, over all its ranks; None where exact mode is not set."""
    return view.settings.get(KEY)


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


def level_of(view: MeshView, *axes: str) -> Level:
    """The pieces of a sum that is split over axes, minor first, which together are one letter's."""
    found = exact(view) or view.shape
    return Level(tuple(Cut(axis, found[axis], view.shape[axis], view.coordinate[axis]) for axis in axes))


def reduce_pieces(values: Sequence[Tensor], view: MeshView, axis: str, what: str, scatter: int | None = None) -> Tensor:
    """The sum over an axis of what each rank has for each of its pieces, in their order: in the tree.

    values: of one shape, which may be changed. scatter: the dim of which each rank keeps its chunk; None for none.
    """
    level = level_of(view, axis)
    found = tree_sum(values, single(level.held()[0], level.count), level.pieces, add)
    total = stacked(found, held(level))
    if view.shape[axis] == 1:
        return total
    how = summed(level, axis, 0)
    if scatter is None:
        return TreeAllReduce(view.axes[axis], how, what)(total)
    return TreeReduceScatter(view.axes[axis], scatter, how, what)(total)
