"""How commands look: tables fit, help says what is typed, and what needs no torch does not wait for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_help_examples import HELP
from typer.testing import CliRunner

from shardgrad.cli import style
from shardgrad.cli.app import app

COLUMNS = ("contender", "least", "wall", "/ plain")
ROWS = [("shardgrad", "252.2", "1,279.6 [1,177.2, 1,442.1]", "1.478 [1.120, 1.567]")]


@pytest.mark.parametrize("width", [60, 80])
def test_a_table_leaves_out_whole_columns_and_says_which(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    on = Console(width=width, highlight=False)
    style.table(COLUMNS, ROWS, numbers=COLUMNS[1:], dispensable=("wall",), on=on)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    left_out = ["wall"] if width == 60 else []
    assert ("left out for want of room: wall (--json has all)" in printed) == bool(left_out)
    for name, cell in zip(COLUMNS, ROWS[0], strict=True):
        assert (cell in printed) == (name not in left_out)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("command", ["bytes", "memory --sizes s=8,b=1,h=16,a=2 --ranks 2"])
def test_tables_of_bench_fit(command: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "WIDTH", width)
    ran = CliRunner().invoke(app, ["bench", *command.split()])
    assert ran.exit_code == 0, ran.output
    assert max(len(line.rstrip()) for line in ran.stdout.splitlines()) <= width
    assert "…" not in ran.stdout
    for whole in ("column_sequence", "25,165,824") if command == "bytes" else ("tp+sp", "/ paper"):
        assert whole in ran.stdout


@pytest.mark.parametrize("names", HELP, ids=" ".join)
def test_help_says_what_is_typed(names: tuple[str, ...]) -> None:
    ran = CliRunner().invoke(app, [*names, "--help"])
    assert ran.exit_code == 0
    for python in ("<int", "<str", "<bool", "<list", "BOOLEAN", "INTEGER"):
        assert python not in ran.stdout


@pytest.mark.parametrize("words", ["--version", "train nope", "verify nope", "trace quickstart model.leyers=1"])
def test_torch_is_not_waited_for(words: str, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # importing it fails
        "from shardgrad.cli.entry import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if words == "--version" else 2)
