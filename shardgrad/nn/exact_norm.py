"""The norm of a model's gradients in exact mode: of each piece of each parameter, added in one order on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product as every
from math import gcd, prod

import torch
from torch import Tensor

from shardgrad.comm.collectives import AllGather
from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.pieces import exact
from shardgrad.errors import LayoutError
from shardgrad.layout.cost import Collective, sent
from shardgrad.nn.dtensors import is_dtensor, pieces
from shardgrad.nn.sharding import ParamSharding
from shardgrad.ops.in_pieces import compact, piece

Named = tuple[str, Tensor, ParamSharding | None]


@dataclass(frozen=True)
class _Cut:
    """How a gradient is cut, alike on any number of ranks.

    axes, counts: of each dim that is cut, its axes, major first, and the pieces on this rank; axes over which all ranks
    have the same are left out. owner: the mesh, or the parameter that alone is cut so.
    """

    owner: str
    axes: tuple[tuple[str, ...], ...] = ()
    counts: tuple[int, ...] = ()


def pieces_of_norm(parameters: Sequence[Named], accumulate: Callable[[Iterable[Tensor]], Tensor]) -> list[Tensor]:
    """What the gradients of each piece add to the norm, of all ranks' pieces and alike on every rank.

    Parameters that are cut alike are accumulated together, piece by piece; a few numbers for each piece are gathered.

    Args:
        accumulate: of some gradients a tensor of few numbers, [2].

    Raises:
        LayoutError: pieces do not divide a parameter, or torch shards it.
    """
    groups: dict[_Cut, tuple[list[list[Tensor]], MeshView | None]] = {}
    for name, parameter, sharding in parameters:
        if is_dtensor(parameter):
            raise LayoutError(f"exact mode: {name} is a DTensor, whose gradient torch sums in an order of its own")
        held = [] if parameter.grad is None else pieces(parameter.grad, sharding)
        leaves: Sequence[ParamSharding | None] = [None] if sharding is None else sharding.leaves
        for at, leaf in enumerate(leaves):
            cut, counts = _cut(name, leaf)
            mesh_view = None if leaf is None else view(leaf.mesh)
            group, _ = groups.setdefault(cut, ([[] for _ in range(prod(counts))], mesh_view))
            for mine, place in zip(group, every(*map(range, counts)), strict=True):
                mine += [compact(piece(held[at][0], place, counts))] if held else []
    found = []
    for cut, (group, mesh_view) in groups.items():
        numbers = torch.stack([accumulate(gradients) for gradients in group])
        found += list((numbers if mesh_view is None else _of_all_ranks(numbers, mesh_view, cut)).unbind())
    return found


def pieces_of_norm_collectives(parameters: Sequence[Named]) -> list[Collective]:
    """Every collective of `pieces_of_norm`, with its bytes."""
    cuts = dict[_Cut, MeshView]()
    for name, _, sharding in parameters:
        for leaf in () if sharding is None else sharding.leaves:
            cuts.setdefault(_cut(name, leaf)[0], view(leaf.mesh))
    found = []
    for cut, mesh_view in cuts.items():
        numbers = 2 * prod(cut.counts)
        for axis in (axis for axes in cut.axes for axis in reversed(axes) if mesh_view.shape[axis] > 1):
            count = sent("all-gather", numbers, mesh_view.shape[axis])
            found.append(Collective("clip", "all-gather", "norms", axis, 8 * count))
            numbers *= mesh_view.shape[axis]
    return found


def _cut(name: str, leaf: ParamSharding | None) -> tuple[_Cut, list[int]]:
    """How a gradient is cut, and into how many pieces along each of its dims on this rank."""
    pieces_of = None if leaf is None else exact(view(leaf.mesh))
    if leaf is None or pieces_of is None:
        return _Cut(name), []
    mesh_view = view(leaf.mesh)
    varies = dict(leaf.varies)
    axes, counts = [], []
    for dim, size, here in zip(leaf.spec.dims, leaf.shape, leaf.block()[1]):
        cutting = tuple(axis for axis in dim.axes if pieces_of[axis] > 1)
        count = prod(pieces_of[axis] // mesh_view.shape[axis] for axis in cutting)
        if dim.letter in varies:  # as many as the axis may ever shard it into
            count = gcd(pieces_of[varies[dim.letter]], size) * here // size
        if here % count:
            raise LayoutError(
                f"exact mode: {dim} of {name} = {here} on this rank is not {count} equal pieces, which the "
                "norm is made of"
            )
        axes.append(cutting)
        counts.append(count)
    cut = [at for at, dim in enumerate(leaf.spec.dims) if axes[at] or dim.letter in varies]
    owner = name if varies else mesh_view.handle
    return _Cut(owner, tuple(axes[at] for at in cut), tuple(counts[at] for at in cut)), counts


def _of_all_ranks(numbers: Tensor, mesh_view: MeshView, cut: _Cut) -> Tensor:
    """The numbers of all ranks' pieces, [pieces, 2], in the order of the pieces; of this rank's."""
    made = numbers.view(*cut.counts, numbers.shape[-1])
    for dim, axes in enumerate(cut.axes):
        for axis in reversed(axes):
            over = mesh_view.axes[axis]
            if over.size > 1:
                made = AllGather(over, dim, over.size * made.shape[dim], "all-gather of the gradients' norm")(made)
    return made.reshape(-1, numbers.shape[-1])
