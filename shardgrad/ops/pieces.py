"""Communication hidden behind the product that it belongs to: both are cut into pieces, and run side by side.

A reduction: each piece of the product is reduced while the next is computed. A gather: the part of the product that
needs the own shard alone comes first, and each piece of the others' shards is multiplied while the next arrives.
Pieces are cut along rows only, so no sum is split that was not split before. (Overlap by splitting: Wang et al. 2023,
ASPLOS, doi 10.1145/3567955.3567959.)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from shardgrad.comm import collectives as raw
from shardgrad.comm.mesh import Axis
from shardgrad.layout.sizes import chunk
from shardgrad.ops.contract import Contraction
from shardgrad.ops.route import Step


def _cuts(size: int, pieces: int) -> list[tuple[int, int]]:
    """Start and length of each piece that is not empty, as torch.chunk cuts."""
    found = [chunk(size, pieces, at) for at in range(pieces)]
    return [(start, length) for start, length in found if length]


class ReducedInPieces:
    """A product that is summed over an axis, piece by piece: an all-reduce, or a reduce-scatter along a row dim."""

    def __init__(self, product: Contraction, step: Step, pieces: int) -> None:
        assert step.axis is not None
        self._product, self._step, self._pieces, self._axis = product, step, pieces, step.axis
        self._sum = raw.AllReduce(step.axis, step.what)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        shape, matrix, other = self._product.as_matrices(left, right)
        if self._step.kind == "all-reduce":
            return self._all_reduced(shape, matrix, other)
        return self._scattered(shape, matrix, other)

    def _all_reduced(self, shape: Sequence[int], left: Tensor, right: Tensor) -> Tensor:
        out = left.new_empty(shape)
        flat = out.view(left.shape[0], right.shape[1])
        works = []
        for start, length in _cuts(left.shape[0], self._pieces):
            piece = flat[start : start + length]
            torch.mm(left[start : start + length], right, out=piece)
            works.append(self._sum.start(piece))
        for work in works:
            self._sum.wait(work)
        return out

    def _scattered(self, shape: Sequence[int], left: Tensor, right: Tensor) -> Tensor:
        at, ranks, (inner, columns) = self._step.dim, self._axis.size, right.shape
        before, after, own = prod(shape[:at]), prod(shape[at + 1 : self._product.rows]), shape[at] // ranks
        rows = left.view(before, ranks, own, after, inner)
        out = left.new_empty((*shape[:at], own, *shape[at + 1 :]))
        blocks = out.view(before, own, after, columns)
        coming = []
        for start, length in _cuts(own, self._pieces):
            piece = left.new_empty((ranks, before, length, after, columns))
            for rank in range(ranks):
                mine = rows[:, rank, start : start + length].reshape(before * length * after, inner)
                torch.mm(mine, right, out=piece[rank].view(before * length * after, columns))
            coming.append((start, length, raw.reduce_scatter(piece, self._axis, 0, self._step.what)))
        for start, length, pending in coming:
            blocks[:, start : start + length] = pending.wait()[0]
        return out


class GatheredInPieces:
    """Products of one tensor that is gathered along a row dim, piece by piece, the own shard's part first."""

    def __init__(self, products: Sequence[Contraction], step: Step, pieces: int, *, assemble: bool) -> None:
        assert step.axis is not None
        self._products, self._step, self._pieces = tuple(products), step, pieces
        self._axis: Axis = step.axis
        self._assemble = assemble

    def __call__(self, stored: Tensor, others: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Each product with the whole tensor; and the whole tensor itself, if it is to be assembled."""
        axis, at = self._axis, self._step.dim
        shape = stored.shape
        before, own, after = prod(shape[:at]), shape[at], prod(shape[at + 1 :])
        mine = stored.reshape(before, own, after)
        coming = []
        for start, length in _cuts(own, self._pieces):
            piece = mine[:, start : start + length].contiguous().unsqueeze(0)
            coming.append((start, length, raw.all_gather(piece, axis, 0, axis.size, self._step.what)))
        whole = stored.new_empty((*shape[:at], axis.size * own, *shape[at + 1 :])) if self._assemble else None
        parts = None if whole is None else whole.view(before, axis.size, own, after)
        if parts is not None:
            parts[:, axis.index] = mine
        outs = []
        made_whole: list[Tensor] = []
        for product, other in zip(self._products, others):
            out, matrix, right = product.as_matrices(stored, other)
            made = stored.new_empty((*out[:at], axis.size * own, *out[at + 1 :]))
            rows = made.view(before, axis.size, own, prod(out[at + 1 :]))
            _multiply(matrix, right, rows[:, axis.index])
            outs.append((product, rows, right))
            made_whole.append(made)
        for start, length, pending in coming:
            pieces = pending.wait()
            for rank in range(axis.size):
                if rank == axis.index:
                    continue
                if parts is not None:
                    parts[:, rank, start : start + length] = pieces[rank]
                for product, rows, right in outs:
                    matrix = pieces[rank].view(before * length * prod(shape[at + 1 : product.rows]), right.shape[0])
                    _multiply(matrix, right, rows[:, rank, start : start + length])
        return made_whole, whole


def _multiply(left: Tensor, right: Tensor, into: Tensor) -> None:
    """into, of any strides, becomes left · right."""
    flat = into.view(left.shape[0], right.shape[1]) if into.is_contiguous() else None
    if flat is not None:
        torch.mm(left, right, out=flat)
    else:
        into.copy_(torch.mm(left, right).view(into.shape))
