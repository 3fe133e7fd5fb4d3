"""Sizes of shards: how an axis shards a letter, nested, and what one rank can know from the shards it holds.

The numbers of ranks along the axes of a mesh say how they shard: an `int` as torch.chunk does, 9 over 4 ranks as 3, 3,
3, 0; a `Balanced` one as 3, 2, 2, 2.

A level is a letter sharded over some axes: ("n", ("dp", "tp")) is the size of n on this rank after dp, then tp. From a
level every finer one follows; a coarser one does not, and where it is needed and unknown the ranks must exchange it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from shardgrad.layout.notation import Dim

Level = tuple[str, tuple[str, ...]]


class Balanced(int):
    """The number of ranks along an axis whose shards differ by one element at most: the first ones have one more.

    In a mesh that is described by numbers, `{"tp": sg.Balanced(4)}`; a DeviceMesh has it from `sg.set_balanced`. It is
    its number in all else, also of equality.
    """

    def __new__(cls, ranks: int) -> Self:
        return super().__new__(cls, ranks)


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of one of `parts` chunks: as torch.chunk shards, ceil(size / parts) each, the last ones less; of
    `Balanced` ones the first size % parts have one more than the others."""
    if isinstance(parts, Balanced):
        most, longer = size // int(parts), size % int(parts)
        start = index * most + _least(index, longer)
        return start, (index + 1) * most + _least(index + 1, longer) - start
    most = -(-size // parts)
    start = _least(index * most, size)
    return start, _least(most, size - start)


def chunks(size: int, parts: int) -> list[int]:
    """The lengths of all of them, the longest first."""
    return [chunk(size, parts, index)[1] for index in range(parts)]


def is_torch_chunk(size: int, parts: int) -> bool:
    """Whether the chunks are torch.chunk's as well, which DTensor takes all shards to be."""
    return chunks(size, parts) == chunks(size, int(parts))


def rule(*ranks: int) -> str:
    """How axes of so many ranks shard, for messages."""
    return "balanced" if any(isinstance(one, Balanced) for one in ranks) else "torch.chunk"


def _least(a: Any, b: Any) -> Any:
    """The smaller one; of sizes that torch.compile leaves open, not decided."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return b.__sym_min__(a) if isinstance(a, int) else a.__sym_min__(b)


def slab(size: int, axes: Iterable[str], shape: Mapping[str, int], coordinate: Mapping[str, int]) -> tuple[int, int]:
    """Start and length of this rank's part of a letter of global `size` sharded over `axes`, major first."""
    start = 0
    for axis in axes:
        offset, size = chunk(size, shape[axis], coordinate[axis])
        start += offset
    return start, size


@dataclass(slots=True)
class Sizes:
    """The sizes that one rank knows.

    shape, coordinate: of each mesh axis, how many ranks and which of them this one is.
    """

    shape: Mapping[str, int]
    coordinate: Mapping[str, int]
    known: dict[Level, int] = field(default_factory=dict)

    def level(self, letter: str, axes: Iterable[str] = ()) -> Level:
        """A level's name, in which axes of one rank do not count."""
        return letter, tuple(axis for axis in axes if self.shape[axis] > 1)

    def get(self, letter: str, axes: Iterable[str] = ()) -> int | None:
        """The size at a level, from the finest coarser level that is known; None if there is none."""
        _, all_axes = self.level(letter, axes)
        for depth in range(len(all_axes), -1, -1):
            size = self.known.get((letter, all_axes[:depth]))
            if size is not None:
                return slab(size, all_axes[depth:], self.shape, self.coordinate)[1]
        return None

    def shape_of(self, dims: Iterable[Dim]) -> tuple[int, ...]:
        """The local shape of a tensor stored as `dims`; every size must be known."""
        shape = []
        for dim in dims:
            size = self.get(dim.letter, dim.axes)
            assert size is not None, f"the size of {dim} was not resolved"
            shape.append(size)
        return tuple(shape)
