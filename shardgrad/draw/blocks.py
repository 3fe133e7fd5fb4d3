"""Which rank holds which block of a tensor, as rectangles: a tensor of any dims laid flat, in sheets where it must be.

The letters of a matrix drawn fall into three groups: those along its height, along its width, and those that all three
tensors of a product carry (sheets). In a group the letters that some axis shards are drawn, nested in their order, and
those that stand before such a one, as the q, k, v of a fused weight `W[c,h/tp,k,d]` do: what a rank holds lies in
strides. The others are whole wherever they occur.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from itertools import product as every
from math import prod

from shardgrad.layout.notation import Dim
from shardgrad.layout.plan import Dims
from shardgrad.layout.sizes import slab
from shardgrad.layout.steps import Timeline

MOST_STRIDES = 8  # of a letter before a sharded one; of a larger one the picture shows one index for all
Interval = tuple[float, float]  # start and length, as parts of 1
Rectangle = tuple[float, float, float, float]  # left, top, width, height, as parts of 1


@dataclass(frozen=True, slots=True)
class Block:
    """What some ranks hold alike: the rectangles of it on one sheet.

    terms: the ranks that hold each term of it, where it is a sum not yet summed; else the ranks that hold it.
    """

    ranks: tuple[int, ...]
    terms: tuple[tuple[int, ...], ...]
    rectangles: tuple[Rectangle, ...]

    @property
    def label(self) -> str:
        """The ranks, or the sum of their terms."""
        return " + ".join(listed(ranks) for ranks in self.terms)


@dataclass(frozen=True, slots=True)
class Sheet:
    """The blocks of one part of the batched letters and of one term of a sum.

    batch, term: which part and which term; the first of each lies in front.
    """

    batch: int
    term: int
    blocks: tuple[Block, ...]


def listed(ranks: Sequence[int]) -> str:
    """`0–3`, `0, 2`: runs of three and more are written short."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]}–{run[-1]}"] if len(run) > 2 else map(str, run)
    return ", ".join(parts)


class Rulers:
    """Where shards of a letter end anywhere in the picture, and with that how parts of it are laid along an edge.

    repeated: letters before a sharded one that are too large for strides; every index of them is sharded alike.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.borders: dict[str, list[int]] = {}
        self.repeated: list[str] = []
        for step in timeline.steps:
            for travel in (*step.reads, step.made, *((step.bias,) if step.bias else ())):
                for dims in (travel.before, travel.after):
                    self._note(dims)
        for group in (timeline.layout.rows, timeline.layout.contracted, timeline.layout.columns):
            self._strides(group)

    def _strides(self, group: Sequence[str]) -> None:
        last = max((at for at, letter in enumerate(group) if letter in self.borders), default=0)
        for letter in group[:last]:
            size = self.timeline.sizes[letter]
            if letter in self.borders or size < 2:
                continue
            if size <= MOST_STRIDES:
                self.borders[letter] = list(range(size + 1))
            else:
                self.repeated.append(letter)

    def _note(self, dims: Dims) -> None:
        for dim in dims:
            if any(self.timeline.mesh[axis] > 1 for axis in dim.axes):
                found = {0, self.timeline.sizes[dim.letter], *self.borders.get(dim.letter, ())}
                for rank in self.timeline.ranks:
                    start, length = slab(self.timeline.sizes[dim.letter], dim.axes, rank.shape, rank.coordinate)
                    found |= {start, start + length}
                self.borders[dim.letter] = sorted(found)

    def count(self, letters: Iterable[str]) -> int:
        """The number of smallest parts along an edge of these letters."""
        return prod(max(1, len(self.borders[letter]) - 1) for letter in letters if letter in self.borders)

    def intervals(self, dims: Dims, rank: int) -> list[Interval]:
        """The parts of an edge that a rank has; dims: those along the edge, in order."""
        drawn = [dim for dim in dims if dim.letter in self.borders]
        joined: list[Interval] = []
        for start, length in self._nested(drawn, rank):
            if joined and abs(sum(joined[-1]) - start) < 1e-9:
                start, length = joined[-1][0], joined.pop()[1] + length
            joined.append((start, length))
        return joined

    def _nested(self, dims: Sequence[Dim], rank: int) -> list[Interval]:
        if not dims:
            return [(0.0, 1.0)]
        dim, inner = dims[0], dims[1:]
        size = self.timeline.sizes[dim.letter]
        if size == 0:
            return []
        start, length = self._slab(dim, rank)
        if not inner:
            return [(start / size, length / size)] if length else []
        within = self._nested(inner, rank)
        borders = self.borders[dim.letter]
        found = []
        for low, high in pairwise(borders):
            if start <= low and high <= start + length:
                found += [(low / size + at * (high - low) / size, of * (high - low) / size) for at, of in within]
        return found

    def parts(self, dims: Dims, rank: int) -> set[int]:
        """The numbers of the smallest parts of an edge that a rank has."""
        numbers = [0]
        for dim in dims:
            if dim.letter not in self.borders:
                continue
            borders = self.borders[dim.letter]
            start, length = self._slab(dim, rank)
            own = [at for at, (low, high) in enumerate(pairwise(borders)) if start <= low < high <= start + length]
            numbers = [outer * (len(borders) - 1) + at for outer in numbers for at in own]
        return set(numbers)

    def _slab(self, dim: Dim, rank: int) -> tuple[int, int]:
        sizes = self.timeline.ranks[rank]
        return slab(self.timeline.sizes[dim.letter], dim.axes, sizes.shape, sizes.coordinate)


def along(dims: Dims, letters: Sequence[str]) -> Dims:
    """The dims of some letters, in the letters' order (tensors of one product may order theirs differently)."""
    return tuple(dim for letter in letters for dim in dims if dim.letter == letter)


def sheets(
    rulers: Rulers, dims: Dims, partial: Sequence[str], height: Sequence[str], width: Sequence[str]
) -> tuple[Sheet, ...]:
    """A tensor stored as `dims`, a sum over the axes `partial`, drawn with these letters along its height and width.

    Letters of `dims` in neither are batched: a sheet for each part of them.
    """
    timeline = rulers.timeline
    down, across = along(dims, height), along(dims, width)
    batched = tuple(dim for dim in dims if dim.letter not in height and dim.letter not in width)
    found: dict[tuple[int, int], dict[tuple[Rectangle, ...], list[int]]] = {}
    terms = list(every(*(range(timeline.mesh[axis]) for axis in partial)))
    for rank, sizes in enumerate(timeline.ranks):
        term = terms.index(tuple(sizes.coordinate[axis] for axis in partial))
        rectangles = tuple(
            (x, y, w, h) for y, h in rulers.intervals(down, rank) for x, w in rulers.intervals(across, rank)
        )
        for part in rulers.parts(batched, rank) if rectangles else ():
            found.setdefault((part, term), {}).setdefault(rectangles, []).append(rank)
    made = []
    for (part, term), held in sorted(found.items()):
        blocks = []
        for rectangles, ranks in held.items():
            all_terms = [found.get((part, other), {}).get(rectangles, []) for other in range(len(terms))]
            blocks.append(Block(tuple(ranks), tuple(map(tuple, filter(None, all_terms))), rectangles))
        made.append(Sheet(part, term, tuple(blocks)))
    return tuple(made)


def none(sheets: Iterable[Sheet], ranks: int) -> tuple[int, ...]:
    """The ranks, of so many, that hold no element of a tensor."""
    held = {rank for sheet in sheets for block in sheet.blocks for rank in block.ranks}
    return tuple(rank for rank in range(ranks) if rank not in held)


def edge(dims: Dims, letters: Sequence[str], sizes: Mapping[str, int], mesh: Mapping[str, int]) -> tuple[str, str]:
    """What is written at an edge: the letters with the axes that shard them, the sizes with the numbers of ranks."""
    here = along(dims, letters)
    numbers = ["/".join(map(str, (sizes[d.letter], *(mesh[axis] for axis in d.axes)))) for d in here]
    return " · ".join(map(str, here)), " · ".join(numbers)
