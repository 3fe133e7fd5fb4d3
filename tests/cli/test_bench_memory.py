"""`shardgrad bench memory` prints what was counted."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from shardgrad.bench.memory import Sizes, counted, one_rank_of
from shardgrad.cli.app import app


def test_json_has_what_is_counted() -> None:
    ran = CliRunner().invoke(app, ["bench", "memory", "--sizes", "s=8,b=1,h=16,a=2", "--ranks", "1,2", "--json"])
    assert ran.exit_code == 0, ran.output
    rows = json.loads(ran.output)
    assert len(rows) == 12
    found = {(row["t"], row["scheme"], row["recompute"]): row["counted"] for row in rows}
    with one_rank_of(2):
        assert found[2, "tp+sp", "nothing"] == counted(Sizes(8, 1, 16, 2, 2), "tp+sp", "nothing")
    assert all(row["counted"] == row["expected"] < row["paper"] or row["recompute"] == "block" for row in rows)


def test_the_table_and_what_is_refused() -> None:
    ran = CliRunner().invoke(app, ["bench", "memory", "--sizes", "s=8,b=1,h=16,a=2", "--ranks", "2"])
    assert ran.exit_code == 0, ran.output
    assert "tp+sp" in ran.output
    for sizes, ranks in (("s=8,b=1,h=16", "2"), ("s=8,b=1,h=16,a=2,q=1", "2"), ("s=8,b=1,h=16,a=2", "3")):
        ran = CliRunner().invoke(app, ["bench", "memory", "--sizes", sizes, "--ranks", ranks])
        assert ran.exit_code == 2, ran.output
