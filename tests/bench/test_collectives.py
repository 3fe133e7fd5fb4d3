"""The measurement of collectives: what it measures, and what its command refuses. No number is asserted here."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardgrad.bench.collectives import OPERATIONS, Row, draw, measure, size_text
from shardgrad.cli.app import app
from shardgrad.testing import distributed


@distributed(world_size=2)
def test_every_operation_is_measured_on_every_size(rank: int, world_size: int) -> None:
    said: list[Row] = []
    rows = measure(list(OPERATIONS), [6, 4096], 1, said.append)
    assert rows == said
    assert [(row.operation, row.bytes) for row in rows] == [
        (operation, size) for operation in OPERATIONS for size in ([8, 4096] if operation != "barrier" else [0])
    ]
    assert all(row.gloo > 0 and row.shm > 0 and row.ranks == 2 for row in rows)


def test_sizes_and_operations_are_checked_before_ranks_start() -> None:
    for arguments, complaint in (["--sizes", "2KB"], "is no size"), (["--operations", "all-sum"], "is not one of"):
        result = CliRunner().invoke(app, ["bench", "collectives", *arguments], env={"COLUMNS": "300"})
        assert result.exit_code == 2
        assert complaint in result.output.replace("\n", " ")


def test_picture_and_texts(tmp_path: Path) -> None:
    rows = [Row("all-reduce", size, 2, 300.0, 15.0) for size in (2048, 2**20)]
    draw(rows, tmp_path / "times.png")
    assert (tmp_path / "times.png").stat().st_size > 5000
    assert rows[0].ratio == pytest.approx(20)
    assert [size_text(n) for n in (12, 2048, 3 * 2**19)] == ["12 B", "2 KiB", "1.5 MiB"]
