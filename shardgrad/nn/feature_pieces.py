"""Norms over features that an axis shards in exact mode: of each piece of the rows and of the features by itself, with
what all pieces of the features bring to a row.

| norm          | forward over the axis       | backward over the axis       | numbers a row, of V pieces on p ranks |
| ------------- | --------------------------- | ---------------------------- | ------------------------------------- |
| `SquaresNorm` | the tree over Σ x²          | the tree over its gradients  | 1, 1                                  |
| `MomentsNorm` | all-gather of the pieces'   | the tree over their          | 2 V / p, 2 V                          |
|               | means and Σ (x - mean)²     | gradients, and scatter       |                                       |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.collectives import AllGather
from shardgrad.comm.first_derivatives import FirstDerivativeOnly
from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.comm.pieces import level_of, reduce_pieces, reduce_pieces_collectives
from shardgrad.layout.cost import Collective, itemsize
from shardgrad.layout.sizes import chunks
from shardgrad.layout.tree import Level
from shardgrad.nn.pieces import Cut, counts, is_exact
from shardgrad.nn.replicated import one
from shardgrad.nn.sharded_norm import (
    MomentsNorm,
    SquaresNorm,
    sharded_norm,
    sharded_norm_collectives,
    weight_and_bias,
    wide,
)
from shardgrad.ops.in_pieces import compact
from shardgrad.ops.pieces import cut, join


@dataclass(frozen=True)
class ShardedFeatures:
    """One dim, of letters one of which an axis shards.

    here: the size of each letter on this rank. at: which of them is sharded. of_ranks: the features of each rank.
    """

    here: tuple[int, ...]
    at: int
    of_ranks: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], at: int, over: Axis) -> ShardedFeatures:
        """sizes: global."""
        rest = prod(size for letter, size in enumerate(sizes) if letter != at)
        shards = chunks(sizes[at], over.size)
        here = (*sizes[:at], shards[over.index], *sizes[at + 1 :])
        return cls(here, at, tuple([rest * shard for shard in shards]))


def norm_of_features(
    norm: SquaresNorm | MomentsNorm,
    x: Tensor,
    parameters: Sequence[Sequence[Tensor]],
    rows: Cut,
    features: ShardedFeatures,
    mesh: DeviceMesh,
    axis: str,
) -> Tensor:
    """The norm of x [..., features of this rank]; in exact mode, piece by piece.

    Args:
        parameters: weight and bias, as far as there are any, for each piece of the rows.
        rows: the dims of rows that axes shard.

    Raises:
        LayoutError: pieces do not divide the rows or the features.
    """
    if not is_exact(mesh):
        [own] = parameters
        return sharded_norm(norm, x, *weight_and_bias(own), mesh, axis)
    mesh_view, level, first = view(mesh), level_of(view(mesh), axis), x.dim() - 1
    if isinstance(norm, MomentsNorm):
        norm = replace(norm, features=(sum(norm.features) // level.pieces,) * level.pieces)
    along = {**counts(mesh, rows, x), first + features.at: level.count}
    pieces = cut(x.unflatten(-1, features.here), along)
    used = _of_pieces(parameters, features, level.count, len(pieces) // level.count)
    own_x = [wide(piece.flatten(first), *own) for piece, own in zip(pieces, used, strict=True)]
    share = _Total if isinstance(norm, SquaresNorm) else _Gathered
    every = share.apply(level, mesh_view, *map(norm.stats, own_x))
    made = [norm.finish(piece, stats, *weight_and_bias(own)) for piece, stats, own in zip(own_x, every, used)]
    return join([y.to(x.dtype).view(piece.shape) for y, piece in zip(made, pieces)], along).flatten(first)


def _of_pieces(
    parameters: Sequence[Sequence[Tensor]], features: ShardedFeatures, count: int, rows: int
) -> list[tuple[Tensor, ...]]:
    """The parts of parameters that so many pieces of the features use, for each piece of the rows."""
    found: list[tuple[Tensor, ...]] = []
    for own in parameters:
        parts = [cut(each.view(features.here), {features.at: count}) for each in own]
        found += zip(*([part.flatten() for part in each] for each in parts)) if parts else [()] * count
    return found * rows if len(parameters) == 1 else found


def norm_of_features_collectives(kind: str, rows: int, dtype: Any, mesh: DeviceMesh, axis: str) -> Iterator[Collective]:
    """Every collective of `norm_of_features`, but those of parameters, forward and backward. Arguments as of
    `sharded_norm_collectives`."""
    if not is_exact(mesh):
        yield from sharded_norm_collectives(kind, rows, dtype, mesh, axis)
        return
    mesh_view, width = view(mesh), itemsize(dtype)
    level = level_of(mesh_view, axis)
    if kind == "rms":
        for phase, what in (("forward", "norm: squares"), ("dX", "norm: d squares")):
            yield from reduce_pieces_collectives(phase, what, rows, width, [level], mesh_view)
    else:
        yield from one(mesh, "forward", "all-gather", "norm: moments", axis, 2 * rows * level.count, dtype)
        every = 2 * rows * level.pieces
        yield from reduce_pieces_collectives("dX", "norm: d moments", every, width, [level], mesh_view, scatter=True)


class _Total(FirstDerivativeOnly):
    """The sums over all pieces of the features, for each piece; it is its own adjoint.

    Of the pieces, those of the features are the fastest.
    """

    what = "a norm over pieces of the features"

    @staticmethod
    def forward(ctx: Any, level: Level, mesh_view: MeshView, *terms: Tensor) -> tuple[Tensor, ...]:
        ctx.where = level, mesh_view
        return _total(terms, level, mesh_view)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_total(grads, *ctx.where)


def _total(terms: Sequence[Tensor], level: Level, mesh_view: MeshView) -> tuple[Tensor, ...]:
    rows = len(terms) // level.count
    sides = [torch.stack(list(terms[at :: level.count])) for at in range(level.count)]
    total = reduce_pieces(sides, [level], mesh_view, "a sum over pieces of the features")
    return tuple([total[row] for row in range(rows) for _ in range(level.count)])


class _Gathered(FirstDerivativeOnly):
    """What all pieces of the features have, [V, ...], for each piece. The gradients of each are summed in the tree."""

    what = "a norm over pieces of the features"

    @staticmethod
    def forward(ctx: Any, level: Level, mesh_view: MeshView, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.where = level, mesh_view
        rows = len(own) // level.count
        every = torch.stack(own).unflatten(0, (rows, level.count)).transpose(0, 1).contiguous()
        if level.ranks > 1:
            every = AllGather(mesh_view.axes[level.cuts[0].axis], 0, level.pieces)(every)
        return tuple([compact(every[:, row]) for row in range(rows) for _ in range(level.count)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        level, mesh_view = ctx.where
        rows = len(grads) // level.count
        terms = [torch.stack(list(grads[at :: level.count]), 1) for at in range(level.count)]
        scatter = {level.cuts[0].axis: 0}
        own = reduce_pieces(terms, [level], mesh_view, "a sum over pieces of the features", scatter)  # [V / p, rows, …]
        return None, None, *(own[at, row] for row in range(rows) for at in range(level.count))
