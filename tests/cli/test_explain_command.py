"""`shardgrad explain` as its users type it, and the style that all commands share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shardgrad import PRESETS, Layout
from shardgrad.cli.app import app

ROOT = Path(__file__).parents[2]
SMALL = ("--sizes", "n=7,d=3,m=5", "--mesh", "tp=2")


def run(*arguments: str, columns: int = 100) -> tuple[int, str, str]:
    done = CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb"}).invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def explained(*arguments: str) -> dict[str, Any]:
    status, out, err = run("explain", *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_words_without_sizes() -> None:
    assert run("explain", "row") == (0, PRESETS["row"].explain() + "\n", "")
    assert run("explain", "row", "--bias")[1] == Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m] + B[m]").explain() + "\n"


def test_bytes_and_shapes_of_a_rank_and_of_all() -> None:
    found = explained("column_sequence", *SMALL, "--dtype", "bfloat16", "--rank", "1")
    assert found["layout"] == "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]"
    assert (found["mesh"], found["dtype"], found["rank"]) == ({"tp": 2}, "bfloat16", 1)
    assert [(t["stored"], t["shape"], t["local"], t["bytes"], t["copies"]) for t in found["tensors"]] == [
        ("X[n/tp,d]", [7, 3], [3, 3], 18, 1),
        ("W[d,m/tp]", [3, 5], [3, 2], 12, 1),
        ("Y[n,m/tp]", [7, 5], [7, 2], 28, 1),
    ]
    assert [
        (p["phase"], p["flop"], p["flop_all_ranks"], [(m["operation"], m["tensor"], m["bytes"]) for m in p["moves"]])
        for p in found["phases"]
    ] == [
        ("forward", 2 * 7 * 3 * 2, 2 * 7 * 3 * 5, [("all-gather", "X", 24)]),  # 4 rows, padded, to one other rank
        ("dX", 2 * 7 * 3 * 2, 2 * 7 * 3 * 5, [("reduce-scatter", "dX", 24)]),
        ("dW", 2 * 7 * 3 * 2, 2 * 7 * 3 * 5, [("all-gather", "X", 24)]),
    ]
    assert (found["bytes"], found["bytes_all_ranks"]) == (72, 144)


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_fits_the_terminal(columns: int) -> None:
    for name, layout in PRESETS.items():
        sizes = ",".join(f"{letter}=4096" for letter in layout.letters)
        mesh = ",".join(f"{axis}=2" for axis in layout.axes)
        _, out, _ = run("explain", name, "--sizes", sizes, "--mesh", mesh, "--bias", columns=columns)
        assert max(map(len, out.split("\n"))) <= columns
        lines = [" ".join(line.split()) for line in out.split("\n")]
        for one in layout.collectives(dict.fromkeys(layout.letters, 4096), dict.fromkeys(layout.axes, 2), bias=True):
            told = f"{one.operation} {one.tensor} over {one.axis}"
            assert any(told in line for line in lines), told


def test_the_table_says_amounts() -> None:
    _, out, _ = run("explain", "row", "--sizes", "n=1000,d=2000,m=500", "--mesh", "tp=4", "--bias")
    lines = [" ".join(line.split()) for line in out.split("\n")]
    for told in (
        "n = 1000, d = 2000, m = 500; mesh tp = 4; float32",
        "X[n,d/tp] 1000×2000 1000×500 2.00 MB 1",
        "B[m] 500 500 2.00 kB 4",
        "forward Y[n,m] = Σ_d X[n,d/tp] W[d/tp,m] 500 MFLOP 2.00 GFLOP",
        "all-reduce Y over tp 3.00 MB 12.0 MB",
        "add B, once – –",
        "sent in forward and backward 3.00 MB 12.0 MB",
    ):
        assert told in lines, out


@pytest.mark.parametrize("tp", [2, 4])
def test_a_transformer_layer_moves_what_the_papers_say(tp: int) -> None:
    """Narayanan et al. 2021: 8 b s h (t - 1)/t elements a layer; Korthikanti et al. 2022: with sequence parallelism
    10 if the two gathered inputs are gathered again in backward, 8 if they are kept."""
    b, s, h = 4, 16, 32
    unit = b * s * h * (tp - 1) // tp
    plain = (("X[b,s,d] W[d,m/tp] -> Y[b,s,m/tp]", ()), ("X[b,s,d/tp] W[d/tp,m] -> Y[b,s,m]", ()))
    again = (("X[b,s/tp,d] W[d,m/tp] -> Y[b,s,m/tp]", ()), ("X[b,s,d/tp] W[d/tp,m] -> Y[b,s/tp,m]", ()))
    kept = ((again[0][0], ("--save-gathered", "X")), again[1])
    for (column, row), factor in ((plain, 8), (again, 10), (kept, 8)):
        moved = 0
        for (text, more), d, m in ((column, h, 3 * h), (row, h, h), (column, h, 4 * h), (row, 4 * h, h)):
            sizes = f"b={b},s={s},d={d},m={m}"
            moved += explained(text, "--sizes", sizes, "--mesh", f"tp={tp}", "--dtype", "bfloat16", *more)["bytes"]
        assert moved == 2 * factor * unit


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("X[n,d/tp] W[d,m] -> Y[n,m]",), "the nearest legal layouts:\n  X[n,d] W[d,m] -> Y[n,m]\n"),
        (("X[n,d",), "but the text ends"),
        (("colum",), "no layout is called 'colum'; the nearest name is 'column'; those with a name are column, row"),
        (("column", "--draw", "a.svg"), "--draw also needs sizes and a mesh: --sizes n=…,d=…,m=… --mesh tp=…"),
        (("column", "--json"), "--json also needs sizes and a mesh"),
        (("column", "--sizes", "n=7,d=3", "--mesh", "tp=2"), "sizes lacks letter 'm'"),
        (("column", "--sizes", "n=7,d=3,m=1"), "a mesh: --sizes n=…,d=…,m=… --mesh tp=…"),
        (("column", *SMALL, "--rank", "2"), "rank 2 is not one of the 2 ranks of the mesh {'tp': 2}"),
        (
            ("column", *SMALL, "--dtype", "int3"),
            "'int3' is no dtype: float64, float32, bfloat16, float16",
        ),
        (
            ("column", *SMALL, "--save-gathered", "Q"),
            "'Q' is no operand of X[n,d] W[d,m/tp] -> Y[n,m/tp]: X or W",
        ),
        (("column", *SMALL, "--draw", "a.gif"), "a picture ends in .svg, .png or .pdf, not 'a.gif'"),
        (("column", *SMALL, "--draw", "/no/such/a.svg"), "there is no folder /no/such"),
        (("column", "--sizes", "n=7,d"), "cannot read 'd': write name=number"),
        (("column", "--sizes", "n=7,n=8"), "n stands twice"),
        (("column", "--mesh", "tp=-2"), "cannot read 'tp=-2'"),
        (("column", *SMALL[:3], "tp=0"), "the mesh has tp = 0: an axis has at least one rank"),
        (("column", *SMALL[:3], "tp=65537"), "the mesh has 65,537 ranks, and each is looked at: at most 65,536"),
        (("column", "--save-gathered", "Q"), "'Q' is no operand"),
        (("column", *SMALL, "--rank", "0", "extra"), "unexpected extra argument"),
        (("column", "--nonsense"), "No such option"),
    ],
)
def test_what_cannot_be_explained_ends_with_status_2_and_words(arguments: tuple[str, ...], told: str) -> None:
    status, out, err = run("explain", *arguments, columns=300)
    assert status == 2
    assert out == ""
    assert told in err
    assert "Traceback" not in err


def test_list_version_help() -> None:
    assert json.loads(run("explain", "--json")[1]) == {name: str(preset) for name, preset in PRESETS.items()}
    listed = run("explain")[1]
    assert all(name in listed and str(preset) in listed for name, preset in PRESETS.items())
    assert run("--version") == (0, version("shardgrad") + "\n", "")
    for command in ("explain", "trace"):
        status, out, _ = run(command, "--help")
        assert status == 0
        assert f"shardgrad {command} " in out.split("Examples:")[1]
    assert all(name in run("explain", "--help")[1] for name in PRESETS)


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "shardgrad", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=everything, check=False)


@pytest.mark.slow
def test_as_a_program(tmp_path: Path) -> None:
    done = shell("explain", "column", *SMALL, "--draw", str(tmp_path / "c.png"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"drawn in {tmp_path / 'c.png'}\n")
    assert max(map(len, done.stdout.split("\n")[:-2])) <= 100  # a pipe has no width of its own
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    wrong = shell("explain", "X[n/tp,d] W[d,m] -> Y[n,m]")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("illegal layout\n")
    assert "Traceback" not in wrong.stderr


def test_the_shell_completes_commands_and_names() -> None:
    def completed(words: str, number: int) -> list[str]:
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(number), "_SHARDGRAD_COMPLETE": "complete_bash"}
        return shell(**asked).stdout.split()

    assert completed("shardgrad ex", 1) == ["explain"]
    assert completed("shardgrad explain column_", 2) == ["column_sequence", "column_wx"]


def test_balanced_axes() -> None:
    numbers = ("--sizes", "n=6,d=3,m=9", "--mesh", "tp=4", "--rank", "3")
    assert [tensor["local"] for tensor in explained("column", *numbers)["tensors"]] == [[6, 3], [3, 0], [6, 0]]
    found = explained("column", *numbers, "--balanced")
    assert [tensor["local"] for tensor in found["tensors"]] == [[6, 3], [3, 2], [6, 2]]
    assert found["mesh"] == {"tp": 4}
    assert "tp = 4 (balanced);" in run("explain", "column", *numbers, "--balanced")[1]
    assert "balanced" not in run("explain", "column", *numbers)[1]
    assert run("explain", "column_sequence", "--mesh", "tp=4", "--balanced", "--code")[0] == 0
    status, _, err = run("explain", "column", "--balanced")
    assert status != 0
    assert "--balanced says how the axes of a mesh shard" in err
