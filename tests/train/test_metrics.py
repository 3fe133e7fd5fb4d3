"""What a run writes down, and how a run that goes on writes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardgrad.train.metrics import Metrics, read


def test_every_line_is_there_at_once(tmp_path: Path) -> None:
    with Metrics(tmp_path / "m.jsonl") as metrics:
        metrics.write("train", step=1, loss=5.5)
        metrics.write("end", step=2)
        lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines == [{"kind": "train", "step": 1, "loss": 5.5}, {"kind": "end", "step": 2}]
    with Metrics(None) as silent:
        silent.write("train", step=1)
        assert not silent.writes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_by_name() -> None:
    with (
        pytest.raises(OSError, match=r"cannot write /dev/full: No space left on device"),
        Metrics(Path("/dev/full")) as metrics,
    ):
        metrics.write("train", step=1)


def test_going_on_cuts_off_what_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with Metrics(path) as metrics:
        for step in range(4):
            metrics.write("train", step=step, loss=0.1 + step)
        metrics.write("held_out", step=2, loss=1 / 3)
        metrics.write("end", step=2)
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # a killed process wrote no more
    with Metrics(path, begun=2) as metrics:
        metrics.write("train", step=3, loss=7.0)
    assert [(line["kind"], line["step"], line.get("loss")) for line in read(path)] == [
        *(("train", 0, 0.1), ("train", 1, 1.1), ("train", 2, 2.1), ("held_out", 2, 1 / 3), ("train", 3, 7.0)),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("line", ["\0\0", "{", "[]", '{"kind": "train"}', '{"kind": "train", "step": null}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text(f'{{"kind": "train", "step": 1}}\n\n{line}\n')
    with pytest.raises(OSError, match=r"m.jsonl, line 3 is not what a run writes: delete the line"):
        Metrics(tmp_path / "m.jsonl", 1)


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begun, losses in ((0, {1: 5.0, 2: 4.0, 3: 9.0}), (2, {3: 3.0})):
        with Metrics(tmp_path / "m.jsonl", begun, tmp_path / "board") as metrics:
            for step, loss in losses.items():
                metrics.write("train", step=step, loss=loss, lr=0.5)
            metrics.write("start", step=begun, mesh={})  # no curve
    shown = EventAccumulator(str(tmp_path / "board")).Reload()
    assert shown.Tags()["scalars"] == ["train/loss", "train/lr"]
    assert [(one.step, one.value) for one in shown.Scalars("train/loss")] == [(1, 5.0), (2, 4.0), (3, 3.0)]
