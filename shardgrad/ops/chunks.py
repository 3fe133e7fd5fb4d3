"""Communication hidden behind the product that it belongs to: both are cut into pieces, and run side by side.

A reduction: each piece of the product is reduced while the next is computed. A gather: the part of the product that
needs the own shard alone comes first, if there is one, and each piece of the others' shards is multiplied while the
next arrives. Pieces are cut along rows or columns of the product, so no sum is split that was not split before.
(Overlap by splitting: Wang et al. 2023, ASPLOS, doi 10.1145/3567955.3567959.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from shardgrad.comm import collectives as raw
from shardgrad.comm.mesh import Axis
from shardgrad.ops.contract import Contraction
from shardgrad.ops.overlap import Chunking
from shardgrad.ops.route import Step


class ChunkedMatmulReduce:
    """A product that is summed over an axis, piece by piece: by all-reduces or reduce-scatters.

    by_rows: whether it is cut along its rows; else along its columns. A reduce-scatter needs the other side whole.
    """

    def __init__(self, product: Contraction, step: Step, chunking: Chunking, *, by_rows: bool) -> None:
        assert step.axis is not None
        assert step.ready is not None
        self._product, self._chunking, self._by_rows = product, chunking, by_rows
        self._ready = step.ready
        if by_rows and step.kind == "reduce-scatter":  # rows are one dim there
            self._ready = raw.ReduceScatter(step.axis, step.dim - product.rows + 1, step.what)

    def start(self, left: Tensor, right: Tensor) -> Callable[[], Tensor]:
        """Compute the product and start to sum it; what is returned waits for the sum, and returns it."""
        shape, left, right = self._product.as_matrices(left, right)
        if isinstance(self._ready, raw.AllReduce) and self._by_rows:
            return self._in_place(self._ready, shape, left, right)
        return self._rows(shape, left, right) if self._by_rows else self._columns(shape, left, right)

    def _in_place(
        self, reduce: raw.AllReduce, shape: Sequence[int], left: Tensor, right: Tensor
    ) -> Callable[[], Tensor]:
        out = left.new_empty(shape)
        flat = out.view(left.shape[0], right.shape[1])
        works = []
        for start, length in self._chunking.chunks(left.shape[0]):
            piece = flat[start : start + length]
            torch.mm(left[start : start + length], right, out=piece)
            works.append(reduce.start(piece))

        def wait() -> Tensor:
            for work in works:
                reduce.wait(work)
            return out

        return wait

    def _rows(self, shape: Sequence[int], left: Tensor, right: Tensor) -> Callable[[], Tensor]:
        rows, count = self._product.rows, left.shape[0]
        coming = []
        for start, length in self._chunking.chunks(count):
            piece = torch.mm(left[start : start + length], right).view(length, *shape[rows:])
            coming.append(raw.begin(self._ready, piece))

        def wait() -> Tensor:
            parts = [pending.wait() for pending in coming]
            out = parts[0].new_empty((*shape[:rows], *parts[0].shape[1:]))
            torch.cat(parts, out=out.view(count, *parts[0].shape[1:]))
            return out

        return wait

    def _columns(self, shape: Sequence[int], left: Tensor, right: Tensor) -> Callable[[], Tensor]:
        rows, count = self._product.rows, right.shape[1]
        coming = []
        for start, length in self._chunking.chunks(count):
            piece = torch.mm(left, right[:, start : start + length]).view(*shape[:rows], length)
            coming.append(raw.begin(self._ready, piece))

        def wait() -> Tensor:
            parts = [pending.wait() for pending in coming]
            out = parts[0].new_empty((*parts[0].shape[:-1], *shape[rows:]))
            torch.cat(parts, -1, out=out.view(*parts[0].shape[:-1], count))
            return out

        return wait


class ChunkedGatherMatmul:
    """Products of one tensor that is gathered along a row dim, piece by piece, the own shard's part first."""

    def __init__(self, products: Sequence[Contraction], step: Step, chunking: Chunking, *, assemble: bool) -> None:
        assert step.axis is not None
        self._products, self._step, self._chunking = tuple(products), step, chunking
        self._axis: Axis = step.axis
        self._gather = raw.AllGather(step.axis, 0, step.axis.size, step.what)
        self._assemble = assemble

    def __call__(self, stored: Tensor, others: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Each product with the whole tensor; and the whole tensor itself, if it is to be assembled."""
        axis, at = self._axis, self._step.dim
        shape = stored.shape
        before, own, after = prod(shape[:at]), shape[at], prod(shape[at + 1 :])
        mine = stored.reshape(before, own, after)
        coming = []
        for start, length in self._chunking.chunks(own):
            piece = mine[:, start : start + length].contiguous().unsqueeze(0)
            coming.append((start, length, raw.begin(self._gather, piece)))
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
            chunks = pending.wait()
            for rank in range(axis.size):
                if rank == axis.index:
                    continue
                if parts is not None:
                    parts[:, rank, start : start + length] = chunks[rank]
                for product, rows, right in outs:
                    matrix = chunks[rank].view(before * length * prod(shape[at + 1 : product.rows]), right.shape[0])
                    _multiply(matrix, right, rows[:, rank, start : start + length])
        return made_whole, whole


def _multiply(left: Tensor, right: Tensor, into: Tensor) -> None:
    """into, of any strides, becomes left · right."""
    flat = into.view(left.shape[0], right.shape[1]) if into.is_contiguous() else None
    if flat is not None:
        torch.mm(left, right, out=flat)
    else:
        into.copy_(torch.mm(left, right).view(into.shape))


class ChunkedRhsGatherMatmul:
    """A product whose second operand, a stored weight, is gathered piece by piece, along a letter of the product.

    along: the dim of the second operand that is cut, and that becomes dim `place` of the product. If it is also the dim
    that is gathered, the own shard's part comes first.
    """

    def __init__(
        self, product: Contraction, step: Step, chunking: Chunking, along: int, place: int, *, assemble: bool
    ) -> None:
        assert step.axis is not None
        assert step.ready is not None
        self._product, self._step, self._chunking = product, step, chunking
        self._axis: Axis = step.axis
        self._along, self._place, self._assemble = along, place, assemble
        # Every rank's piece by itself, or already side by side.
        self._gather = raw.AllGather(step.axis, 0, step.axis.size, step.what) if along == step.dim else step.ready

    def __call__(self, stored: Tensor, others: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """The product of the other operand with the whole weight; and that itself, if it is to be assembled."""
        (left,), axis, at, along = others, self._axis, self._step.dim, self._along
        own_first = at == along
        blocks: list[tuple[int, raw.Pending]] = []  # where each begins along that dim of a shard
        for start, length in self._chunking.chunks(stored.shape[along]):
            piece = stored.narrow(along, start, length)
            blocks.append((start, raw.begin(self._gather, piece.unsqueeze(0) if own_first else piece)))
        shape = list(stored.shape)
        shape[at] = self._step.global_size
        whole = stored.new_empty(shape) if self._assemble else None
        out: Tensor | None = None

        def put(start: int, weight: Tensor) -> None:
            nonlocal out
            made = self._product(left, weight)
            if out is None:
                full = list(made.shape)
                full[self._place] = shape[along]
                out = made.new_empty(full)
            out.narrow(self._place, start, weight.shape[along]).copy_(made)
            if whole is not None:
                whole.narrow(along, start, weight.shape[along]).copy_(weight)

        if own_first:
            put(axis.index * stored.shape[along], stored)
        for start, pending in blocks:
            gathered = pending.wait()
            if not own_first:
                put(start, gathered)
                continue
            for rank in range(axis.size):
                if rank != axis.index:
                    put(rank * stored.shape[along] + start, gathered[rank])
        assert out is not None
        return [out], whole
