"""Experiments: the cells that a matrix makes, and what is refused, in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from refused import refusal

from shardgrad.scale.config import load

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "scaling").glob("*.yaml"))
SMALL = """
title: small
matrix: {layout: [column, row_sequence], sizes: {n: 30, d: 11, m: 7}, ranks: [1, 2, 3]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_every_combination_is_a_cell(file: Path) -> None:
    found = load(file).planned
    assert [planned.name for planned in found] == [
        *("column, 1 rank", "column, tp=2", "column, tp=3"),
        *("row_sequence, 1 rank", "row_sequence, tp=2", "row_sequence, tp=3"),
    ]
    assert [planned.cell.world for planned in found] == [1, 2, 3] * 2
    assert len({planned.series for planned in found}) == 2
    assert len({planned.cell.key for planned in found}) == 6


def test_cells_stand_in_place_of_the_matrix(file: Path) -> None:
    cells = "cells=[{}, {layout: 2d, mesh: [{r: 2, c: 1}, {r: 1, c: 2}], ranks: null, overlap: [off, 3]}]"
    found = load(file, [cells, "matrix.ranks=2"]).planned
    assert [(planned.cell.overlap, planned.cell.on) for planned in found[2:]] == [
        (None, {"r": 2, "c": 1}),
        (3, {"r": 2, "c": 1}),
        (None, {"r": 1, "c": 2}),
        (3, {"r": 1, "c": 2}),
    ]


def test_sizes_grow_with_the_ranks_and_widths_divide_by_heads(file: Path) -> None:
    sizes = "matrix.sizes={batch: 1, sequence: 5, d: 256, heads: 4}"
    block = [
        "matrix.layout=null",
        "matrix.kind=block",
        sizes,
        "matrix.grow={d: 0.5, heads: 0.5}",
        "matrix.ranks=[1, 2, 4]",
    ]
    found = [planned.cell.sizes for planned in load(file, block).planned]
    assert [(one["d"], one["heads"]) for one in found] == [(256, 4), (360, 6), (512, 8)]
    assert len({planned.series for planned in load(file, block).planned}) == 1


def test_a_step_with_and_without_sequence_parallelism_is_two_series(file: Path) -> None:
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    step = [f"matrix.train={quickstart}", "matrix.kind=step", "matrix.layout=null", "matrix.sizes={}"]
    found = load(file, [*step, "matrix.ranks=[1, 2]", "matrix.sequence_parallel=[true, false]"]).planned
    assert [planned.label for planned in found] == ["sequence parallel", "replicated rows"] * 2
    assert len({planned.cell.key for planned in found}) == 4


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shipped_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = [planned.name for planned in load(path).planned]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("matrix.layuot=row", "matrix.layuot is no key; the nearest key is layout"),
        ("run.repeat=3", "run.repeat is no key; the nearest key is run.repeats"),
        ("cells=[{rank: 2}]", "cells.0.rank is no key; the nearest key is ranks"),
        ("run.repeats=0", "run.repeats = 0 should be greater than or equal to 1"),
        ("run.warmup=0", "run.warmup = 0 should be greater than or equal to 1"),
        ("matrix.ranks=0", "matrix.ranks = 0 should be greater than or equal to 1"),
        ("matrix.ranks=[]", "matrix.ranks = [] has no value"),
        ("matrix.dtype=float31", "matrix.dtype = 'float31' should be"),
        ("cells=[{overlap: 0}]", "cells.0.overlap"),
        ("matrix.layout=colunm", "no layout is called 'colunm'"),
        ("matrix.layout=2d", "has 2 axes: say mesh: {r: …, c: …}"),
        ("cells=[{mesh: {tp: 3}}]", "mesh = {'tp': 3} has 3 ranks, not ranks = 1"),
        ("cells=[{mesh: {dp: 2}, ranks: null}]", "lacks the axis 'tp'"),
        ("matrix.sizes={n: 3, d: 4}", "m"),
        ("matrix.grow={k: 1}", "grow.k: there is no sizes.k to grow from"),
        ("matrix.kind=block", "layout is for another kind of cell than a block"),
        ("matrix.sequence_parallel=false", "sequence_parallel is for a block or a step: write it into the layout"),
        ("cells=[{kind: step, layout: null}]", "train is missing"),
        ("cells=[{kind: step, layout: null, train: nowhere.yaml, sizes: {}}]", "cannot read the configuration nowhere"),
        ("matrix.layout=X[n/tp,d] W[d/tp,m] -> Y[n,m]", "tp"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(file: Path, override: str, line: str) -> None:
    assert any(line in told for told in refusal(load, file, override)), refusal(load, file, override)
