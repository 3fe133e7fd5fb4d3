"""The one binary tree in which the pieces of a sum are added, whatever the number of ranks that hold them.

A node covers the pieces [a, a + 2^k) with a a multiple of 2^k, less those behind the last piece. Its value is that of
its first half plus that of its second. A rank holds consecutive pieces, so it can add up whole nodes by itself; of
pieces that are a node, as they are wherever there are 2^k of them a rank, it sends one sum, as in any reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Span = tuple[int, int]
"""Consecutive pieces: the first, and the one behind the last."""


def nodes(first: int, end: int, pieces: int) -> list[Span]:
    """The largest nodes of a tree over so many pieces that make up [first, end), in order."""
    found = []
    while first < end:
        size = 1
        while first % (2 * size) == 0 and (first + 2 * size <= end or end == pieces) and first + size < end:
            size *= 2
        found.append((first, min(first + size, pieces)))
        first = found[-1][1]
    return found


def _are_halves(left: Span, right: Span, pieces: int) -> bool:
    """Whether two nodes side by side are the halves of one."""
    size = 1
    while left[0] + size < right[1]:
        size *= 2
    return left[0] % size == 0 and left[1] == left[0] + size // 2 and right[1] == min(left[0] + size, pieces)


@dataclass
class TreeSum(Generic[T]):
    """A sum of pieces that come in order, of which at most log2 of their number, and one, are held at a time.

    pieces: of the whole sum. add: of two values, the first of which it may change. most: the most values held so far.
    """

    pieces: int
    add: Callable[[T, T], T]
    held: list[tuple[Span, T]] = field(default_factory=list)
    most: int = 0

    def push(self, span: Span, value: T) -> None:
        """The next node, and its value."""
        self.most = max(self.most, len(self.held) + 1)
        while self.held and _are_halves(self.held[-1][0], span, self.pieces):
            before, other = self.held.pop()
            span, value = (before[0], span[1]), self.add(other, value)
        self.held.append((span, value))

    @property
    def is_whole(self) -> bool:
        """Whether all pieces have come."""
        return [span for span, _ in self.held] == [(0, self.pieces)]

    @property
    def values(self) -> list[T]:
        """Of the largest nodes that the pieces so far make up, one for each of `nodes`."""
        return [value for _, value in self.held]


def tree_sum(values: Iterable[T], spans: Sequence[Span], pieces: int, add: Callable[[T, T], T]) -> list[T]:
    """The values of the largest nodes that so many nodes side by side make up."""
    found = TreeSum(pieces, add)
    for span, value in zip(spans, values, strict=True):
        found.push(span, value)
    return found.values


def single(first: int, count: int) -> list[Span]:
    """So many pieces, each for itself."""
    return [(at, at + 1) for at in range(first, first + count)]


class Cut(NamedTuple):
    """An axis of the mesh that cuts a sum: into how many pieces, over how many ranks, and which of them this one is."""

    axis: str
    pieces: int
    ranks: int
    place: int


@dataclass(frozen=True, slots=True)
class Level:
    """The pieces of one sum. Each rank holds as many of them, one behind the other.

    cuts: minor first: the ranks of the first hold pieces side by side.
    """

    cuts: tuple[Cut, ...]

    @property
    def pieces(self) -> int:
        """Of the whole sum."""
        return prod(cut.pieces for cut in self.cuts)

    @property
    def ranks(self) -> int:
        return prod(cut.ranks for cut in self.cuts)

    @property
    def count(self) -> int:
        """The pieces of one rank."""
        return self.pieces // self.ranks

    def held(self) -> Span:
        """This rank's pieces."""
        at = self._place(self.cuts, 0)
        return at * self.count, (at + 1) * self.count

    def brought(self, axis: str) -> list[Span]:
        """What each rank of an axis has, once the sum has been reduced over the axes before it."""
        at = next(at for at, cut in enumerate(self.cuts) if cut.axis == axis)
        width = self.count * prod(cut.ranks for cut in self.cuts[:at])
        here, *outer = self.cuts[at:]
        base = here.ranks * self._place(outer, 0)
        return [((base + place) * width, (base + place + 1) * width) for place in range(here.ranks)]

    @staticmethod
    def _place(cuts: Sequence[Cut], place: int) -> int:
        for cut in reversed(cuts):
            place = place * cut.ranks + cut.place
        return place


@dataclass(frozen=True, slots=True)
class Summed:
    """How a reduction over one axis adds.

    pieces: of the whole sum. brought: by each rank of the axis, as `nodes`.
    held: how many nodes come side by side on a first dim, and how many leave so; 0: there is no such dim, and one node.
    lead, beside: how many dims stand before those of the tensor, besides that one, for sums that are taken later, and
        how many terms of these there are side by side.
    """

    pieces: int
    brought: tuple[tuple[Span, ...], ...]
    held: tuple[int, int] = (0, 0)
    lead: int = 0
    beside: int = 1

    @property
    def is_by_rank(self) -> bool:
        """Whether every rank brings one node: then the tree over the pieces is one over the ranks."""
        return self.held == (0, 0) and all(len(nodes) == 1 for nodes in self.brought)

    @property
    def is_plain(self) -> bool:
        """Whether two ranks bring one node each: then any order of adding gives the same bits."""
        return len(self.brought) == 2 and self.is_by_rank


def side_by_side(level: Level) -> int:
    """How many nodes of a level lie side by side before it is reduced; 0 for one."""
    real = next((cut for cut in level.cuts if cut.ranks > 1), None)
    if real is None:
        return 0
    most = max(len(nodes(*span, level.pieces)) for span in level.brought(real.axis))
    return most if most > 1 else 0


def summed(level: Level, axis: str, later: Sequence[Level] = ()) -> Summed:
    """How a reduction of a level over one of its axes adds. later: the sums that are taken later, of several pieces."""
    pieces, real = level.pieces, [cut.axis for cut in level.cuts if cut.ranks > 1]
    brought = tuple(tuple(nodes(*span, pieces)) for span in level.brought(axis))
    at = real.index(axis)
    comes = max(map(len, brought))
    leaves = max(len(nodes(*span, pieces)) for span in level.brought(real[at + 1])) if at + 1 < len(real) else 1
    both = (comes if comes > 1 else 0, leaves if leaves > 1 else 0)
    return Summed(pieces, brought, both, len(later), prod(one.count for one in later))
