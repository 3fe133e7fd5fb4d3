"""Ranks that have no part of a letter, counted against every rank's own sizes."""

from __future__ import annotations

import random
from math import prod

import pytest
from layouts import random_layout, random_sizes

from shardgrad import PRESETS, Layout
from shardgrad.layout.idle import describe, notes, without
from shardgrad.layout.steps import timeline


def test_heads_on_too_many_ranks() -> None:
    layout = Layout("X[n,d] W[h/tp,k,d] -> Q[n,h/tp,k]")
    sizes = {"n": 8, "d": 8, "h": 64, "k": 2}
    said = "960 of 1,024 ranks have no h (64/1,024), and nothing to compute"
    assert notes(layout, sizes, {"tp": 1024}) == [said]
    assert notes(layout, sizes, {"tp": 64}) == []
    assert notes(layout, sizes | {"h": 0}, {"tp": 4}) == []
    assert notes(layout, sizes | {"h": 3}, {"dp": 2, "tp": 4}) == [
        "2 of 8 ranks have no h (3/4), and nothing to compute"
    ]


def test_what_is_only_stored_in_parts() -> None:
    said = notes(PRESETS["column_sequence"], {"n": 5, "d": 4, "m": 8}, {"tp": 8})
    assert said == ["3 of 8 ranks have no n (5/8) of X to store"]


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_the_ranks_without_elements(seed: int) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng, ("a", "b", "c"))
    sizes = {letter: size or 1 for letter, size in random_sizes(rng, layout).items()}
    mesh = {axis: rng.choice((1, 2, 3, 5)) for axis in ("a", "b", "c")}
    walked = timeline(layout, sizes, mesh)
    for spec in layout.tensors[:3]:
        for dim in spec.dims:
            held = [here.shape_of((dim,))[0] for here in walked.ranks]
            assert without(sizes[dim.letter], dim.axes, mesh) == held.count(0)
    idle = sum(not any(step.flops[rank] for step in walked.steps) for rank in range(prod(mesh.values())))
    assert any("nothing to compute" in note for note in notes(layout, sizes, mesh)) == (idle > 0)


def test_a_name_and_what_follows() -> None:
    assert describe(1, "head", ("tp",), {"tp": 2}, ": why") == "1 of 2 ranks has no head (1/2): why"
    assert describe(2, "head", ("tp",), {"tp": 2}) == ""
