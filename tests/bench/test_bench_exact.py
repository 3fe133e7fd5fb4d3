"""What exact mode costs is measured of every case, and what it promises is held. No time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from typer.testing import CliRunner

import shardgrad as sg
from shardgrad.bench import exact
from shardgrad.bench.model import Shape
from shardgrad.bench.timing import Spread
from shardgrad.cli.app import app
from shardgrad.ops.exact import set_exact
from shardgrad.testing import distributed

SHAPE = Shape(layers=1, d_model=32, heads=4, seq_len=8, batch=2, vocab=64)
ONE = Spread(1, 1, 1)
ROW = exact.Row("row", "float32", (8, 4, 16), 4, 1, True, ONE, ONE, ONE, ONE, (64, 64), (0, 0), 3)


@pytest.mark.slow
@distributed(world_size=2)
@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.slow if at else ()) for at, name in enumerate(exact.MODELS)]
)
def test_every_case_is_measured(tmp_path: Path, rank: int, model: str) -> None:
    rows = exact.measure(
        [(8, 4, 16)], [torch.bfloat16], [2, 4], 1, backend="gloo", model=model, shape=SHAPE, turn=0.001
    )
    places = [(2, 1), (4, 1), (2, 2), (4, 2)]
    expected = {(part, *place, True) for part in (*exact.PRODUCTS, exact.STEP) for place in places}
    expected |= {(part, 4, 4, False) for part in exact.PRODUCTS}
    assert {(row.part, row.pieces, row.ranks, row.sends) for row in rows} == expected
    assert len(rows) == len(expected)
    assert exact.broken(rows) == []
    for row in rows:
        assert row.time.median == pytest.approx(row.exact.median / row.ordinary.median)
        assert (row.bytes[0] > 0) == (row.sends and row.ranks > 1)
        if row.part == "row" and row.sends:  # Y is a sum over the pieces, a rank's own ones first
            assert row.most == row.each.bit_length()
    assert json.dumps(exact.as_json(rows))
    if rank == 0:
        exact.draw(rows, tmp_path / "exact.png")
        assert (tmp_path / "exact.png").stat().st_size > 5000


@distributed(world_size=1)
def test_the_sums_held_are_those_of_forward_and_backward() -> None:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("p",))
    assert exact.most_held(mesh) == 1
    set_exact(mesh, 8)
    x, w = torch.ones(8, 3, requires_grad=True), torch.ones(8, 3, requires_grad=True)
    y = sg.matmul(x, w, sg.Layout("X[n,d] W[m/p,d] -> Y[n,m/p]"), mesh)
    assert exact.most_held(mesh) == 1  # nothing is summed over the pieces
    y.backward(torch.ones(8, 8))
    assert exact.most_held(mesh) == 4


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (replace(ROW, bytes=(64, 65)), "exact mode sends 65 bytes, an ordinary step 64"),
        (replace(ROW, most=4), "4 partial sums are held at once, more than 3"),
    ],
)
def test_broken_promises_are_found(row: exact.Row, complaint: str) -> None:
    assert exact.broken([ROW, replace(row, pieces=6, ranks=2)]) == []
    [text] = exact.broken([ROW, row])
    assert text == f"row, float32 [8, 4, 16], 4 pieces on p = 1: {complaint}"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pieces", "2,x"], "are no numbers of pieces"),
        (["--pieces", "1"], "are no numbers of pieces"),
        (["--sizes", "8x64x252"], "divides tokens and hidden features"),
        (["--d-model", "100"], "must be a multiple of 16"),
        (["--model", "bert"], "is not one of"),
        (["--backend", "nccl"], "is not one of"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_ranks_start(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["bench", "exact", *arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert complaint in result.output.replace("\n", " ")
