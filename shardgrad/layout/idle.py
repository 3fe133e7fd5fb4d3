"""Ranks that a mesh has and a size does not fill: who has no part of a letter has no part of the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product as every
from math import prod

from shardgrad.layout.layout import Layout
from shardgrad.layout.sizes import slab


def without(size: int, axes: Sequence[str], mesh: Mapping[str, int]) -> int:
    """How many ranks of a mesh hold none of a letter of global `size` that is sharded over `axes`, major first."""
    places = every(*(range(mesh[axis]) for axis in axes))
    empty = sum(slab(size, axes, mesh, dict(zip(axes, place)))[1] == 0 for place in places)
    return empty * prod(ranks for axis, ranks in mesh.items() if axis not in axes)


def describe(size: int, name: str, axes: Sequence[str], mesh: Mapping[str, int], then: str = "") -> str:
    """`960 of 1,024 ranks have no head (64/1,024)`, then what follows; nothing where every rank has one, or there is
    none at all."""
    count = without(size, axes, mesh) if size else 0
    if not count:
        return ""
    ranks, parts = prod(mesh.values()), "/".join(f"{one:,}" for one in (size, *(mesh[axis] for axis in axes)))
    verb = "has" if count == 1 else "have"
    return f"{count:,} of {ranks:,} ranks {verb} no {name} ({parts}){then}"


def notes(layout: Layout, sizes: Mapping[str, int], mesh: Mapping[str, int]) -> list[str]:
    """What a layout leaves ranks without: a letter that is split, without which they compute nothing; else one that is
    only stored in parts.

    sizes: global, of every letter.
    """
    split: dict[str, tuple[str, ...]] = {}
    for spec in layout.tensors[:3]:
        split |= {dim.letter: dim.axes for dim in layout.reading.compute_layout(spec).dims if dim.axes}
    idle = {
        letter: describe(sizes[letter], letter, axes, mesh, ", and nothing to compute")
        for letter, axes in split.items()
    }
    said = list(idle.values())
    for spec in layout.tensors if layout.has_bias else layout.tensors[:3]:
        said += [
            describe(sizes[dim.letter], dim.letter, dim.axes, mesh, f" of {spec.name} to store")
            for dim in spec.dims
            if dim.axes and not idle.get(dim.letter)
        ]
    return list(filter(None, said))
