"""`shardgrad verify`: its status, its JSON, its picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from typer.testing import CliRunner

from shardgrad.cli.app import app
from shardgrad.verification.observed import Split
from shardgrad.verification.picture import draw
from shardgrad.verification.report import Report, Row

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
TINY = ["model.layers=1", "model.heads=2", "model.d_model=6", "model.seq_len=4", "train.batch=2"]


def command(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `shardgrad verify` on two ranks, with another folder before the others that Python looks in."""
    program = [sys.executable, "-m", "shardgrad", "verify", CONFIG, *TINY, *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_json_and_picture_of_a_right_model(tmp_path: Path) -> None:
    status, told = forked.command(2, "verify", CONFIG, *TINY, "--json", "--draw", tmp_path / "errors.png")
    assert status == 0, told
    found = json.loads(told[0])
    assert found["ok"] is True
    assert found["mesh"] == {"dp": 1, "tp": 2}
    assert {row["kind"] for row in found["rows"]} == {
        "output", "output gradient", "gradient", "loss", "norm", "step", "second step"
    }  # fmt: skip
    assert imread(tmp_path / "errors.png").shape[:2] == (800, 1600)


def test_a_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", CONFIG, *TINY, "model.headz=3"])
    assert done.exit_code == 2
    assert "the nearest key is model.heads" in done.stderr


@pytest.mark.slow
def test_a_mistake_ends_the_command_with_status_1_and_nothing_of_torchruns(tmp_path: Path) -> None:
    """In every rank, before anything else: norms' gradients are not summed over the sequence's parts."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    import shardgrad.nn.norm as norm\n"
        "    norm.row_pieces = lambda parameters, shardings, mesh, dims: [parameters]\n"
    )
    done = command("--rows", "3", path=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "first in the order of execution: the gradient of norm." in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "ChildFailedError" not in done.stderr
    assert "one step of 3,618 parameters" in done.stderr
    assert done.stderr.count("one step") == 1


def row(name: str, kind: str, order: int, ratio: float, verdict: str) -> Row:
    return Row(
        name=name, kind=kind, split=str(Split.of([])), shape=(), order=order, error=ratio, yardstick=1.0, ratio=ratio,
        allowed=5.0, element=ratio, element_allowed=20.0, index=(), rank=0, verdict=verdict,
    )  # type: ignore[arg-type]  # fmt: skip


def test_a_picture_of_what_is_missing_or_infinite(tmp_path: Path) -> None:
    rows = (
        row("a.weight", "gradient", 3, float("inf"), "missing"),
        row("b.weight", "gradient", 2, 1e9, "bug"),
        row("b", "output", 0, 0.0, "rounding"),
        row("v", "value", -1, 1.0, "replicas differ"),
    )
    report = Report(rows, (), {}, {"tp": 2}, "float32", 9)
    draw(report, tmp_path / "errors.svg")
    said = (tmp_path / "errors.svg").read_text()
    for text in ("d a.weight", "d b.weight", "b", "∞", "≤ 0.001", "1,000", "forward", "backward", "accused"):
        assert f"<!-- {text} -->" in said, text
    assert "<!-- first: " not in said  # a value has no place in the picture
    assert report.first is not None
    assert report.first.name == "v"


@pytest.mark.parametrize("first", [0, 20, 39])
def test_the_first_that_is_accused_is_pointed_at_from_above_past_all_others(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    rows = [row(f"layer.{at}.weight", "gradient", at, 0.1, "rounding") for at in range(40)]
    rows[first] = row(f"layer.{first}.weight", "gradient", first, 300.0, "bug")
    for at in {39, first + 1} & set(range(first + 1, 40)):
        rows[at] = row(f"layer.{at}.weight", "gradient", at, 3e6, "missing" if at == 39 else "bug")
    draw(Report(tuple(rows), (), {}, {"tp": 2}, "float32", 9), tmp_path / "errors.svg")
    (axes,) = figures[0].axes
    (pointer,) = (text for text in axes.texts if text.get_text() == f"first: gradient of layer.{first}.weight")
    assert pointer.xy[0] == pointer.xyann[0] == first
    assert pointer.xy[1] == rows[first].score
    points = [tuple(point) for some in axes.collections for point in some.get_offsets()]
    assert max(y for _, y in points) < pointer.xyann[1] < axes.get_ylim()[1]
    assert {y for x, y in points if x == first} == {rows[first].score}
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert f"d layer.{first}.weight" in ticks
    assert len(set(ticks)) == len(ticks)
    assert 8 < len(ticks) < 17
