"""`shardgrad bench bytes`: what layouts send, over the lower bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardgrad.cli.app import app


def test_layouts_that_store_a_part_are_held_to_the_bound(tmp_path: Path) -> None:
    picture = tmp_path / "bytes.svg"
    arguments = [
        "bench",
        "bytes",
        "--sizes",
        "n=1024,d=64,m=64",
        "--ranks",
        "4,16",
        "--json",
        "--draw",
        str(picture),
    ]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    rows = {(row["layout"], row["ranks"]): row for row in json.loads(ran.output)}
    assert len(rows) == 16
    for ranks in (4, 16):
        assert rows["column", ranks]["ratios"] is None
        assert rows["column", ranks]["stored"] > 1
        assert rows["data", ranks]["ratios"] is None
        for name in ("fully_sharded", "3d"):  # n is largest, and the weight small: both attain it
            assert list(rows[name, ranks]["ratios"].values()) == pytest.approx([1, 1, 1])
        assert rows["column_sequence", ranks]["stored"] == rows["row_sequence", ranks]["stored"] == 1
        assert min(rows["column_sequence", ranks]["ratios"].values()) > 1.5
        assert min(rows["2d", ranks]["ratios"].values()) > 1.5
    assert rows["column", 4]["words"] == {"forward": 0, "dX": 2 * 3 * 1024 * 64 // 4, "dW": 0}
    assert picture.read_text().count("</svg>") == 1


def test_the_table_and_what_is_refused() -> None:
    ran = CliRunner().invoke(app, ["bench", "bytes", "--sizes", "n=64,d=64,m=64", "--ranks", "8"])
    assert ran.exit_code == 0, ran.output
    assert "2×2×2" in ran.output
    for sizes, ranks in (("n=64,d=64", "8"), ("n=64,d=64,m=64", "0"), ("n=64,d=64,m=64", "x")):
        assert CliRunner().invoke(app, ["bench", "bytes", "--sizes", sizes, "--ranks", ranks]).exit_code == 2
