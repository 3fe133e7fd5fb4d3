"""The walk through forward and backward: against `collectives`, the rule, and the arithmetic of the whole product."""

from __future__ import annotations

import random
from math import prod

import pytest
from layouts import random_layout, random_sizes

from shardgrad import PRESETS, Layout, LayoutError
from shardgrad.layout.notation import Dim
from shardgrad.layout.plan import Dims
from shardgrad.layout.steps import Timeline, check_rank, timeline
from shardgrad.layout.units import format_si


def cases() -> list[tuple[Layout, dict[str, int], dict[str, int]]]:
    rng = random.Random(5)
    found = [(p, dict(zip(p.letters, (5, 7, 4, 3, 9))), dict.fromkeys(p.axes, 2)) for p in PRESETS.values()]
    for _ in range(30):
        layout = random_layout(rng, ("a", "b", "c"))
        found.append((layout, random_sizes(rng, layout), {axis: rng.choice((1, 2, 3)) for axis in ("a", "b", "c")}))
    return found


CASES = cases()


def real(dims: Dims, walked: Timeline) -> Dims:
    """Without the axes of one rank."""
    return tuple(Dim(d.letter, tuple(a for a in d.axes if walked.mesh[a] > 1)) for d in dims)


@pytest.mark.parametrize("case", CASES, ids=[str(layout) for layout, _, _ in CASES])
def test_walk(case: tuple[Layout, dict[str, int], dict[str, int]]) -> None:
    layout, sizes, mesh = case
    walked = timeline(layout, sizes, mesh, "bfloat16")
    assert len(walked.ranks) == prod(mesh.values())
    for rank, here in enumerate(walked.ranks):
        listed = layout.collectives(sizes, mesh, "bfloat16", coordinate=here.coordinate)
        told_of = [
            (step.name, m.move.kind, m.tensor, m.move.axis, m.bytes[rank])
            for step in walked.steps
            for m in step.moves
            if m.move.kind != "slice" and m.bytes[rank]
        ]
        assert told_of == [(c.phase, c.operation, c.tensor, c.axis, c.bytes) for c in listed if c.bytes]
    unmentioned = prod(size for axis, size in mesh.items() if axis not in layout.axes)
    for step in walked.steps:
        if step.made.role != "bias":  # the ranks share the whole product, none does it twice
            assert sum(step.flops) == 2 * prod(sizes.values()) * unmentioned
        for read in step.reads:
            spec = layout[read.name.removeprefix("d")] if read.name != "db" else layout.bias
            if not read.note:
                assert read.before == spec.dims
            if step.made.role != "bias":
                assert real(read.after, walked) == real(layout.reading.compute_layout(spec).dims, walked)
        made = {"out": layout.out, "lhs": layout.lhs, "rhs": layout.rhs, "bias": layout.bias}
        spec = made[step.made.role]
        assert real(step.made.after, walked) == real(spec.dims, walked)
        left = spec.partial if step.name == "forward" else spec.grad_partial
        assert step.made.partial_after == tuple(axis for axis in left if mesh[axis] > 1)
        if step.made.role != "bias":
            lacking = {axis for axis in layout.reading.communicated_over(spec) if mesh[axis] > 1}
            assert set(step.made.partial_before) == lacking


def test_ranks_are_numbered_as_torch_numbers_them() -> None:
    walked = timeline(PRESETS["2d"], {"n": 2, "d": 2, "m": 2}, {"r": 2, "c": 3})
    assert [tuple(here.coordinate.values()) for here in walked.ranks] == [
        *((0, 0), (0, 1), (0, 2)),
        *((1, 0), (1, 1), (1, 2)),
    ]


def test_where_a_gathered_operand_comes_from() -> None:
    sizes, mesh = {"n": 4, "d": 3, "m": 5}, {"tp": 2}
    row = timeline(PRESETS["row_sequence"], sizes, mesh)
    assert [read.note for step in row.steps for read in step.reads] == ["", "", "", "", "gathered for dX", ""]
    column = timeline(PRESETS["column_sequence"], sizes, mesh, save_gathered=["X"])
    assert {read.note for step in column.steps for read in step.reads} == {"", "kept from forward"}


def test_what_is_refused() -> None:
    walked = timeline(PRESETS["column"], {"n": 4, "d": 3, "m": 5}, {"tp": 2})
    assert check_rank(walked, 1) == 1
    for rank in (-1, 2):
        with pytest.raises(LayoutError, match=f"rank {rank} is not one of the 2 ranks"):
            check_rank(walked, rank)
    with pytest.raises(LayoutError, match="lacks axis 'tp'"):
        timeline(PRESETS["column"], {"n": 4, "d": 3, "m": 5}, {"dp": 2})


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        *((0, "0 B"), (7, "7 B"), (999, "999 B"), (1000, "1.00 kB"), (9994, "9.99 kB"), (9996, "10.0 kB")),
        *((99_949, "99.9 kB"), (99_960, "100 kB"), (999_499, "999 kB"), (999_600, "1.00 MB"), (12_582_912, "12.6 MB")),
        *((3.5e9, "3.50 GB"), (2e24, "2000000 EB"), (0.25, "0.25 B")),
    ],
)
def test_amounts(amount: float, text: str) -> None:
    assert format_si(amount, "B") == text
