"""Which rank holds which block: rectangles against torch.chunk, and against the sizes of shards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from layouts import random_layout, random_sizes

from shardgrad import PRESETS, Balanced, Layout
from shardgrad.draw.blocks import Rulers, Sheet, edge, listed, none, sheets
from shardgrad.layout.steps import Timeline, timeline


def drawn(
    layout: Layout, walked: Timeline, name: str, height: Sequence[str], width: Sequence[str]
) -> tuple[Sheet, ...]:
    return sheets(Rulers(walked), layout[name].dims, (), height, width)


def test_columns_are_sharded_as_torch_shards() -> None:
    layout, sizes = PRESETS["column"], {"n": 3, "d": 5, "m": 10}
    walked = timeline(layout, sizes, {"tp": 4})
    (sheet,) = drawn(layout, walked, "W", "d", "m")
    expected, at = [], 0
    for rank, part in enumerate(torch.arange(10).chunk(4)):
        expected.append((rank, ((at / 10, 0.0, len(part) / 10, 1.0),)))
        at += len(part)
    assert [(block.ranks[0], block.rectangles) for block in sheet.blocks] == expected
    (whole,) = drawn(layout, walked, "X", "n", "d")[0].blocks
    assert (whole.ranks, whole.label, whole.rectangles) == ((0, 1, 2, 3), "0–3", ((0.0, 0.0, 1.0, 1.0),))


def test_a_rank_without_elements_has_no_block() -> None:
    layout = PRESETS["column"]
    walked = timeline(layout, {"n": 3, "d": 5, "m": 4}, {"tp": 3})  # chunks of 2, 2, 0
    (sheet,) = drawn(layout, walked, "W", "d", "m")
    assert [block.label for block in sheet.blocks] == ["0", "1"]
    assert none([sheet], 3) == (2,)
    assert none(drawn(layout, walked, "X", "n", "d"), 3) == ()


def test_balanced_columns() -> None:
    layout = PRESETS["column"]
    walked = timeline(layout, {"n": 3, "d": 5, "m": 9}, {"tp": Balanced(4)})
    (sheet,) = drawn(layout, walked, "W", "d", "m")
    left = [
        (block.label, round(9 * block.rectangles[0][0]), round(9 * block.rectangles[0][2])) for block in sheet.blocks
    ]
    assert left == [("0", 0, 3), ("1", 3, 2), ("2", 5, 2), ("3", 7, 2)]


def test_3d_has_every_rank_in_its_place() -> None:
    layout = PRESETS["3d"]  # X[n/a,d/b/c] W[d/b/a,m/c] -> Y[n/a/b,m/c]; rank = 4a + 2b + c
    walked = timeline(layout, {"n": 8, "d": 8, "m": 8}, {"a": 2, "b": 2, "c": 2})
    rulers = Rulers(walked)

    def places(sheet: Sheet) -> dict[str, tuple[float, float]]:
        return {block.label: block.rectangles[0][:2] for block in sheet.blocks}

    (x,) = sheets(rulers, layout["X"].dims, (), "n", "d")
    assert places(x) == {str(4 * a + 2 * b + c): (b / 2 + c / 4, a / 2) for a in (0, 1) for b in (0, 1) for c in (0, 1)}
    (w,) = sheets(rulers, layout["W"].dims, (), "d", "m")
    assert places(w) == {str(4 * a + 2 * b + c): (c / 2, b / 2 + a / 4) for a in (0, 1) for b in (0, 1) for c in (0, 1)}
    made = walked.steps[0].made  # partial over b: a sheet for each term
    front, back = sheets(rulers, made.before, made.partial_before, "n", "m")
    assert (front.term, back.term) == (0, 1)
    assert places(front) == {f"{4 * a + c} + {4 * a + 2 + c}": (c / 2, a / 2) for a in (0, 1) for c in (0, 1)}
    assert [block.ranks for block in back.blocks] == [(2,), (3,), (6,), (7,)]


def test_two_cut_letters_along_one_edge_are_nested() -> None:
    layout = Layout("X[b/dp,s/tp,d] W[d,m/tp] -> Y[b/dp,s,m/tp]")
    walked = timeline(layout, {"b": 2, "s": 4, "d": 3, "m": 6}, {"dp": 2, "tp": 2})
    (x,) = drawn(layout, walked, "X", ("b", "s"), "d")
    assert [(b.label, b.rectangles[0][1], b.rectangles[0][3]) for b in x.blocks] == [
        ("0", 0.0, 0.25),
        ("1", 0.25, 0.25),
        ("2", 0.5, 0.25),
        ("3", 0.75, 0.25),
    ]
    (turned,) = drawn(layout, walked, "X", ("s", "b"), "d")  # s outermost: what a rank has lies in the other order
    assert [(b.label, b.rectangles[0][1]) for b in turned.blocks] == [("0", 0.0), ("1", 0.5), ("2", 0.25), ("3", 0.75)]


def test_what_is_not_contiguous_is_several_rectangles() -> None:
    layout = Layout("X[b/tp,s/dp,d] W[d,m/tp] -> Y[b,s/dp,m/tp]")  # X is gathered along b, whose halves Y has as well
    walked = timeline(layout, {"b": 2, "s": 4, "d": 3, "m": 6}, {"dp": 2, "tp": 2})
    (y,) = drawn(layout, walked, "Y", ("b", "s"), "m")
    assert [(b.label, b.rectangles) for b in y.blocks] == [
        ("0", ((0.0, 0.0, 0.5, 0.25), (0.0, 0.5, 0.5, 0.25))),
        ("1", ((0.5, 0.0, 0.5, 0.25), (0.5, 0.5, 0.5, 0.25))),
        ("2", ((0.0, 0.25, 0.5, 0.25), (0.0, 0.75, 0.5, 0.25))),
        ("3", ((0.5, 0.25, 0.5, 0.25), (0.5, 0.75, 0.5, 0.25))),
    ]


def test_a_fused_weight_is_strides() -> None:
    """q, k and v before the heads: each rank has a third of its features in each third, as torch shards the dim."""
    layout = Layout("X[n,d] W[c,h/tp,k,d] -> Y[n,c,h/tp,k]")
    sizes = {"n": 2, "d": 5, "c": 3, "h": 5, "k": 2}
    walked = timeline(layout, sizes, {"tp": 3})
    (w,) = drawn(layout, walked, "W", ("c", "h", "k"), "d")
    flat = torch.arange(3 * 5 * 2).reshape(3, 5, 2)
    assert [block.label for block in w.blocks] == ["0", "1", "2"]
    for block, part in zip(w.blocks, flat.chunk(3, dim=1)):
        assert len(block.rectangles) == 3
        for (_, top, _, high), run in zip(block.rectangles, part.flatten(1).tolist()):
            assert (30 * top, 30 * high) == pytest.approx((run[0], len(run)))
    (x,) = drawn(layout, walked, "X", "n", "d")
    assert [block.rectangles for block in x.blocks] == [((0.0, 0.0, 1.0, 1.0),)]


def test_a_letter_after_the_sharded_one_and_a_large_one_before_it_make_no_strides() -> None:
    for text in ("X[n,d] W[h/tp,c,d] -> Y[n,h/tp,c]", "X[n,d] W[c,h/tp,d] -> Y[n,c,h/tp]"):
        layout = Layout(text)
        walked = timeline(layout, {"n": 2, "d": 5, "c": 9, "h": 4}, {"tp": 2})
        rulers = Rulers(walked)
        (w,) = sheets(rulers, layout["W"].dims, (), ("c", "h"), "d")
        assert [len(block.rectangles) for block in w.blocks] == [1, 1]
        assert rulers.repeated == (["c"] if "c,h" in text else [])


def test_what_is_whole_is_one_rectangle_though_it_is_sharded_elsewhere() -> None:
    layout = Layout("X[b,s/tp,d] W[d,m/tp] -> Y[b,s,m/tp]")
    walked = timeline(layout, {"b": 2, "s": 4, "d": 3, "m": 6}, {"tp": 2})
    (stored,) = drawn(layout, walked, "X", ("b", "s"), "d")
    assert [len(block.rectangles) for block in stored.blocks] == [2, 2]
    (y,) = drawn(layout, walked, "Y", ("b", "s"), "m")
    assert [len(block.rectangles) for block in y.blocks] == [1, 1]


def test_batched_letters_are_sheets() -> None:
    layout = PRESETS["expert"]
    walked = timeline(layout, {"e": 5, "n": 2, "d": 3, "m": 4}, {"ep": 3})
    found = drawn(layout, walked, "W", "d", "m")
    assert [(sheet.batch, sheet.term, [b.label for b in sheet.blocks]) for sheet in found] == [
        *((0, 0, ["0"]), (1, 0, ["1"]), (2, 0, ["2"]))
    ]


def test_two_batched_letters_are_numbered_through() -> None:
    layout = Layout("X[e/ep,g/gp,n] W[e/ep,g/gp,n,m] -> Y[e/ep,g/gp,m]")
    walked = timeline(layout, {"e": 2, "g": 3, "n": 2, "m": 4}, {"ep": 2, "gp": 3})
    found = drawn(layout, walked, "W", "n", "m")
    assert [(sheet.batch, [b.label for b in sheet.blocks]) for sheet in found] == [(n, [str(n)]) for n in range(6)]


@pytest.mark.parametrize("seed", range(40))
def test_areas_are_the_shards_sizes(seed: int) -> None:
    """Of any layout: a sheet's blocks fill it without overlap, and each rank's are as large as its shard."""
    rng = random.Random(seed)
    layout = random_layout(rng, ("a", "b", "c"))
    sizes = {letter: size or 1 for letter, size in random_sizes(rng, layout).items()}
    walked = timeline(layout, sizes, {axis: rng.choice((1, 2, 3)) for axis in ("a", "b", "c")})
    rulers = Rulers(walked)
    groups = {
        layout.lhs.name: (layout.rows, layout.contracted),
        layout.rhs.name: (layout.contracted, layout.columns),
        layout.out.name: (layout.rows, layout.columns),
    }
    for name, (height, width) in groups.items():
        spec = layout[name]
        found = sheets(rulers, spec.dims, (), height, width)
        weights = [1.0]
        for letter in (letter for letter in spec.letters if letter in layout.batched and letter in rulers.borders):
            borders = rulers.borders[letter]
            parts = [(high - low) / sizes[letter] for low, high in pairwise(borders)]
            weights = [outer * part for outer in weights for part in parts]
        areas = dict.fromkeys(range(len(walked.ranks)), 0.0)
        for sheet in found:
            covered = 0.0
            for block in sheet.blocks:
                area = sum(w * h for _, _, w, h in block.rectangles)
                covered += area
                for rank in block.ranks:
                    areas[rank] += area * weights[sheet.batch]
            assert covered == pytest.approx(1.0)
            boxes = [box for block in sheet.blocks for box in block.rectangles]
            for at, (x, y, w, h) in enumerate(boxes):
                for left, top, wide, high in boxes[:at]:
                    overlap = min(x + w, left + wide) - max(x, left), min(y + h, top + high) - max(y, top)
                    assert min(overlap) < 1e-9
        for rank, here in enumerate(walked.ranks):
            expected = 1.0
            for dim, size in zip(spec.dims, here.shape_of(spec.dims)):
                expected *= size / sizes[dim.letter]
            assert areas[rank] == pytest.approx(expected)


def test_words() -> None:
    assert [listed(ranks) for ranks in ((3,), (0, 1), (0, 1, 2, 3), (0, 2, 4), (0, 1, 2, 5, 7, 8))] == [
        *("3", "0, 1", "0–3", "0, 2, 4", "0–2, 5, 7, 8")
    ]
    dims = Layout("X[b,s/dp/tp,d] W[d,m/tp] -> Y[b,s/dp,m/tp]")["X"].dims
    mesh = {"dp": 2, "tp": 4}
    assert edge(dims, ("b", "s"), {"b": 3, "s": 64, "d": 5, "m": 9}, mesh) == ("b · s/dp/tp", "3 · 64/2/4")
