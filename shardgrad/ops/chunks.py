"""Communication hidden behind the product that it belongs to: both are split into chunks, and run side by side.

A reduction: each chunk of the product is reduced while the next is computed. A gather: the part of the product that
needs the own shard alone comes first, if there is one, and each chunk of the others' shards is multiplied while the
next arrives. Chunks are of rows or columns of the product, so no sum is split that was not split before.
(Overlap by splitting: Wang et al. 2023, ASPLOS, doi 10.1145/3567955.3567959.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm.collectives import AllGather, AllReduce, Collective, Handle, ReduceScatter
from shardgrad.comm.mesh import Axis
from shardgrad.ops.contract import Contraction
from shardgrad.ops.overlap import Chunking


@dataclass(frozen=True, slots=True)
class Transfer:
    """A collective along one axis. global_size: of the dim that a gather gathers."""

    kind: str
    what: str
    axis: Axis
    dim: int
    global_size: int


class ChunkedMatmulReduce:
    """A product that is summed over an axis, chunk by chunk: by all-reduces or reduce-scatters.

    by_rows: whether the chunks are of its rows; else of its columns. A reduce-scatter needs the other side whole.
    """

    def __init__(self, product: Contraction, transfer: Transfer, chunking: Chunking, *, by_rows: bool) -> None:
        self._product, self._chunking, self._by_rows = product, chunking, by_rows
        self._reduce: Collective
        if transfer.kind == "all-reduce":
            self._reduce = AllReduce(transfer.axis, transfer.what)
        else:  # rows are one dim there
            dim = transfer.dim - product.rows + 1 if by_rows else transfer.dim
            self._reduce = ReduceScatter(transfer.axis, dim, transfer.what)
        self._in_place = by_rows and transfer.kind == "all-reduce"

    def start(self, left: Tensor, right: Tensor) -> Handle:
        """Compute the product and start to sum it; what is returned is for `wait`."""
        shape, left, right = self._product.as_matrices(left, right)
        rows = self._product.rows
        chunks: Iterable[Tensor]
        out = None
        if self._by_rows:
            lengths = self._chunking.lengths(left.shape[0])
            lefts = left.split(lengths)
            if self._in_place:
                out = left.new_empty(shape)
                into = out.view(left.shape[0], right.shape[1]).split(lengths)
                chunks = (torch.mm(part, right, out=made) for part, made in zip(lefts, into))
            else:
                chunks = (torch.mm(part, right) for part in lefts)
                if len(shape) - rows > 1:
                    chunks = (made.view(made.shape[0], *shape[rows:]) for made in chunks)
        else:
            chunks = (torch.mm(left, part) for part in right.split(self._chunking.lengths(right.shape[1]), 1))
            if rows > 1:
                chunks = (made.view(*shape[:rows], made.shape[1]) for made in chunks)
        # Each is begun to be summed before the next is computed.
        return shape, [self._reduce.start(made) for made in chunks], out

    def wait(self, handle: Handle) -> Tensor:
        """The summed product."""
        shape, coming, out = handle
        parts = [self._reduce.wait(one) for one in coming]
        if out is not None:
            whole: Tensor = out
            return whole
        rows, first = self._product.rows, parts[0]
        if self._by_rows:
            whole = first.new_empty((*shape[:rows], *first.shape[1:]))
            torch.cat(parts, out=whole.view(prod(shape[:rows]), *first.shape[1:]))
        else:
            whole = first.new_empty((*first.shape[:-1], *shape[rows:]))
            torch.cat(parts, -1, out=whole.view(*first.shape[:-1], prod(shape[rows:])))
        return whole


class ChunkedGatherMatmul:
    """Products of one tensor that is gathered along a row dim, chunk by chunk, the own shard's part first."""

    def __init__(
        self, products: Sequence[Contraction], transfer: Transfer, chunking: Chunking, *, assemble: bool
    ) -> None:
        self._products, self._transfer, self._chunking = tuple(products), transfer, chunking
        self._axis: Axis = transfer.axis
        self._gather = AllGather(transfer.axis, 0, transfer.axis.size, transfer.what)
        self._assemble = assemble

    def __call__(self, stored: Tensor, *others: Tensor) -> Any:
        """Each product with the whole tensor; and the whole tensor itself, if it is to be assembled."""
        at, ranks, index = self._transfer.dim, self._axis.size, self._axis.index
        shape = stored.shape
        before, own = prod(shape[:at]), shape[at]
        lengths = self._chunking.lengths(own)
        coming = [self._gather.start(part) for part in stored.unsqueeze(0).split(lengths, at + 1)]
        whole = stored.new_empty((*shape[:at], ranks * own, *shape[at + 1 :])) if self._assemble else None
        whole_chunks = () if whole is None else _by_rank(whole, before, ranks, own).split(lengths, 2)
        outs: list[Tensor] = []
        sides: list[tuple[slice, Tensor, tuple[Tensor, ...]]] = []  # of other ranks' rows: which, times what, into what
        for product, other in zip(self._products, others):
            out, matrix, right = product.as_matrices(stored, other)
            made = stored.new_empty((*out[:at], ranks * own, *out[at + 1 :]))
            outs.append(made)
            rows = _by_rank(made, before, ranks, own)
            _multiply(matrix, right, rows[index])
            # The ranks before this one in one product, and those after it in another.
            for side in (slice(index), slice(index + 1, ranks)):
                if range(ranks)[side]:
                    sides.append((side, right, rows[side].split(lengths, 2)))
        for chunk, handle in enumerate(coming):
            gathered = self._gather.wait(handle)
            if whole_chunks:
                whole_chunks[chunk].copy_(gathered.view(whole_chunks[chunk].shape))
            for side, right, into in sides:
                _multiply(gathered[side].view(-1, right.shape[0]), right, into[chunk])
        return results(outs, whole)


def _by_rank(whole: Tensor, before: int, ranks: int, own: int) -> Tensor:
    """A gathered tensor as [ranks, before, own, after], as an all-gather leaves it: other dims joined."""
    after = whole.numel() // max(1, before * ranks * own)
    return whole.view(before, ranks, own, after).transpose(0, 1)


def _multiply(left: Tensor, right: Tensor, into: Tensor) -> None:
    """into, of any strides, becomes left · right."""
    if into.is_contiguous():
        torch.mm(left, right, out=into.view(left.shape[0], right.shape[1]))
    else:
        into.copy_(torch.mm(left, right).view(into.shape))


class ChunkedRhsGatherMatmul:
    """A product whose second operand, a stored weight, is gathered chunk by chunk, along a letter of the product.

    along: the dim of the second operand that is split into chunks, and that becomes dim `place` of the product. If it
        is also the dim that is gathered, the own shard's part comes first.
    """

    def __init__(
        self, product: Contraction, transfer: Transfer, chunking: Chunking, along: int, place: int, *, assemble: bool
    ) -> None:
        self._product, self._transfer, self._chunking = product, transfer, chunking
        self._axis: Axis = transfer.axis
        self._along, self._place, self._assemble = along, place, assemble
        # Every rank's chunk by itself, or already side by side.
        dim, size = (0, transfer.axis.size) if along == transfer.dim else (transfer.dim, transfer.global_size)
        self._gather = AllGather(transfer.axis, dim, size, transfer.what)

    def __call__(self, stored: Tensor, left: Tensor) -> Any:
        """The product of the other operand with the whole weight; and that itself, if it is to be assembled."""
        axis, at, along = self._axis, self._transfer.dim, self._along
        own_first = at == along
        blocks: list[tuple[int, Handle]] = []  # where each begins along that dim of a shard
        for start, length in self._chunking.chunks(stored.shape[along]):
            part = stored.narrow(along, start, length)
            blocks.append((start, self._gather.start(part.unsqueeze(0) if own_first else part)))
        shape = list(stored.shape)
        shape[at] = self._transfer.global_size
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
        for start, handle in blocks:
            gathered = self._gather.wait(handle)
            if not own_first:
                put(start, gathered)
                continue
            for rank in range(axis.size):
                if rank != axis.index:
                    put(rank * stored.shape[along] + start, gathered[rank])
        assert out is not None
        return results([out], whole)


def results(outs: Sequence[Tensor], whole: Tensor | None) -> Any:
    """One tensor, or all of them."""
    found = [*outs, whole] if whole is not None else list(outs)
    return found[0] if len(found) == 1 else found
