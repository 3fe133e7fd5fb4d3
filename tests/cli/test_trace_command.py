"""`shardgrad trace` on two ranks, and what it refuses before it starts any."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import forked
import pytest
from typer.testing import CliRunner

from shardgrad.cli.app import app
from shardgrad.draw.timeline import PHASES, STEP

CONFIG = """
model: {layers: 1, heads: 3, d_model: 12, seq_len: 9}
train: {steps: 5, batch: 3, lr: 0.01}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.slow
def test_two_ranks(config: Path, tmp_path: Path) -> None:
    picture, events = tmp_path / "step.svg", tmp_path / "step.json"
    more = ["--ranks", "2", "--json", "--draw", picture, "--perfetto", events]
    status, printed = forked.command(2, "trace", config, "model.heads=4", *more)
    assert status == 0, printed
    told = json.loads(printed[0])
    assert (told["config"], told["overrides"], told["unit"]) == (str(config), ["model.heads=4"], "ms")
    assert [one["rank"] for one in told["ranks"]] == [0, 1]
    for one in told["ranks"]:
        assert one["products"] > 0
        assert one["operations"] > 0
        assert one["starting"] > 0
        assert one["waiting"] > 0
        parts = one["products"] + one["operations"] + one["starting"] + one["waiting"]
        assert parts <= one["step"] + 1e-6  # a rank's own thread does one thing at a time
        assert one["travelling"] <= one["waiting"] + one["hidden"] + 1e-6
        assert one["hidden"] <= one["travelling"] <= one["step"]
    counts = {one["collectives"] for one in told["ranks"]}
    assert len(counts) == 1
    everything = json.loads(events.read_text())["traceEvents"]
    for rank in (0, 1):
        names = [event["name"] for event in everything if event["pid"] == rank and event["ph"] == "X"]
        assert names.count(STEP) == 1
        assert [name for name in names if name in PHASES] == sorted(PHASES, key=names.index)
        starts = [name for name in names if name.startswith("start ")]
        waits = [name for name in names if name.startswith("wait for ")]
        assert {len(starts)} == counts
        asked, waited = (
            Counter(name.split(" ", 1 + (name[0] == "w"))[-1] for name in some) for some in (starts, waits)
        )
        assert waited <= asked  # what was done as soon as it was started is not waited for
        assert waited
        assert "start reduce-scatter of dX over tp" in starts
        assert not [name for name in names if name.startswith("gloo:")]  # but shared memory, as the run has it
    begins = [event["ts"] for event in everything if event["name"] == STEP]
    assert abs(begins[0] - begins[1]) < 5e6  # one clock: within seconds, not since different bases
    drawn = picture.read_text()
    assert "<!-- rank 0 -->" in drawn
    assert "<!-- rank 1 -->" in drawn
    assert f"<!-- One training step of {config} on 2 ranks, shm -->" in drawn


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("model.layer=2",), "model.layer is no key; the nearest key is model.layers"),
        (("mesh.tp=3", "--ranks", "2"), "mesh.tp = 3, but --ranks is 2: give --ranks 3"),
        (("mesh.device=cuda",), "a step is looked at on the CPU"),
        (("--draw", "step.gif"), "a picture ends in .svg, .png or .pdf, not 'step.gif'"),
        (("--perfetto", "/no/such/folder/step.json"), "there is no folder /no/such/folder"),
        (("--ranks", "0"), "Invalid value for '--ranks'"),
    ],
)
def test_what_is_refused_before_any_rank_starts(config: Path, arguments: tuple[str, ...], told: str) -> None:
    done = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, ["trace", str(config), *arguments])
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert told in done.stderr


def test_no_configuration(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["trace", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2
    assert "cannot read the configuration" in done.stderr
