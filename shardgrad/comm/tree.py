"""Reductions over one axis that add in the tree of `layout.tree`, whatever the backend's own order.

All-to-all, the tree on each rank's part, and for an all-reduce an all-gather: the bytes of a ring, and only data move
(on NCCL too, whose sums depend on its algorithm). Two ranks with a term each add alike in any order: there the backend
adds; and so where it adds in the tree itself, as shared memory does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardgrad.comm.collectives import (
    AllGather,
    AllReduce,
    AllToAllRows,
    Collective,
    Handle,
    ReduceScatter,
    in_blocks,
    padded,
)
from shardgrad.comm.mesh import Axis
from shardgrad.layout.sizes import chunk
from shardgrad.layout.tree import Span, Summed, tree_sum


def stacked(values: Sequence[Tensor], held: int) -> Tensor:
    """Sums of nodes side by side on a first dim of so many, zeros behind them; the one sum itself where held is 0."""
    if not held:
        [value] = values
        return value
    return torch.stack([*values, *(torch.zeros_like(values[0]) for _ in range(held - len(values)))])


def add(left: Tensor, right: Tensor) -> Tensor:
    """left + right, in left."""
    return left.add_(right)


class _Begun(NamedTuple):
    collective: Collective
    handle: Handle


class _Plain(NamedTuple):
    """The backend's own reduction, where it adds as the tree does: whatever it adds, or float32 and float64 alone."""

    collective: Collective
    always: bool

    @staticmethod
    def of(collective: Collective, summed: Summed) -> _Plain | None:
        in_tree = summed.is_by_rank and collective.axis.backend_adds_in_tree
        return _Plain(collective, summed.is_plain) if summed.is_plain or in_tree else None

    def adds(self, x: Tensor) -> bool:
        return self.always or x.dtype in (torch.float32, torch.float64)

    def start(self, x: Tensor) -> _Begun:
        return _Begun(self.collective, self.collective.start(x))


class TreeAllReduce(Collective):
    """The sum over the ranks, alike on every one: of [held, …] → [held, …], or without the first dims."""

    __slots__ = ("_plain", "_summed")

    def __init__(self, axis: Axis, summed: Summed, what: str) -> None:
        super().__init__(axis, what, _unused, _unused)
        self._summed = summed
        self._plain = _Plain.of(AllReduce(axis, what), summed)

    def __call__(self, x: Tensor) -> Tensor:
        """The result for `x`."""
        if self._plain is not None and self._plain.adds(x):
            return self._plain.collective(x)
        return self.wait(self.start(x))

    def start(self, x: Tensor) -> Handle:
        if self._plain is not None and self._plain.adds(x):
            return self._plain.start(x)
        held, ranks = self._summed.held[0] or 1, self.axis.size
        flat = x.reshape(held, -1)
        each = -(-flat.shape[1] // ranks)
        parts = padded(flat, 1, each * ranks - flat.shape[1]).view(held, ranks, each)
        exchange, sent = _exchange(parts.transpose(0, 1), self.axis, self.what)
        return exchange, sent, x.shape[1:] if self._summed.held[0] else x.shape

    def wait(self, handle: Handle) -> Tensor:
        if isinstance(handle, _Begun):
            return handle.collective.wait(handle.handle)
        exchange, sent, shape = handle
        ranks, (came, leaves) = self.axis.size, self._summed.held
        received = exchange.wait(sent)
        own = _tree(received.view(ranks, came or 1, -1), self._summed)  # [leaves, each], or [each]
        whole = AllGather(self.axis, 0, ranks * own.numel(), self.what)(own.reshape(-1))
        elements = shape.numel()
        if not leaves:
            return whole[:elements].view(shape)
        return whole.view(ranks, leaves, -1).transpose(0, 1).reshape(leaves, -1)[:, :elements].reshape(leaves, *shape)


class TreeReduceScatter(Collective):
    """The sum over the ranks, of which each keeps its chunk along `dim` (of the tensor, without leading dims)."""

    __slots__ = ("_dim", "_plain", "_summed")

    def __init__(self, axis: Axis, dim: int, summed: Summed, what: str) -> None:
        super().__init__(axis, what, _unused, _unused)
        self._dim, self._summed = dim + summed.lead, summed
        self._plain = _Plain.of(ReduceScatter(axis, self._dim, what), summed)

    def start(self, x: Tensor) -> Handle:
        if self._plain is not None and self._plain.adds(x):
            return self._plain.start(x)
        held, ranks = self._summed.held[0], self.axis.size
        x = x if held else x.unsqueeze(0)
        dim = self._dim + 1
        size = x.shape[dim]
        parts = in_blocks(x, dim, ranks).movedim(dim, 0)
        exchange, sent = _exchange(parts, self.axis, self.what)
        return exchange, sent, parts.shape[1:], chunk(size, ranks, self.axis.index)[1]

    def wait(self, handle: Handle) -> Tensor:
        if isinstance(handle, _Begun):
            return handle.collective.wait(handle.handle)
        exchange, sent, shape, own = handle
        received = exchange.wait(sent)
        summed = _tree(received.view(self.axis.size, *shape), self._summed)
        dim = self._dim + bool(self._summed.held[1])
        return summed if own == summed.shape[dim] else summed.narrow(dim, 0, own).clone()


def _exchange(parts: Tensor, axis: Axis, what: str) -> tuple[AllToAllRows, Handle]:
    """Send part i, of [ranks, …], to rank i: begun."""
    flat = parts.reshape(-1)
    each = [flat.numel() // axis.size] * axis.size
    exchange = AllToAllRows(axis, each, each, what)
    return exchange, exchange.start(flat)


def _tree(received: Tensor, summed: Summed) -> Tensor:
    """What every rank brought, [ranks, held, …], added: [held, …], or without the first dim."""
    values: list[Tensor] = []
    spans: list[Span] = []
    for parts, brought in zip(received.unbind(), summed.brought, strict=True):
        values += parts[: len(brought)].unbind()
        spans += brought
    found = tree_sum(values, spans, summed.pieces, add)
    return stacked(found, summed.held[1])


def _unused(*_: Any) -> None:
    raise AssertionError("a reduction in a tree is made of other collectives")
