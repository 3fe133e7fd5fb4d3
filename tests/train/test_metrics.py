"""What a run writes down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardgrad.train.metrics import Metrics, draw


def test_every_line_is_there_at_once(tmp_path: Path) -> None:
    with Metrics(tmp_path / "m.jsonl") as metrics:
        metrics.write("train", step=1, loss=5.5)
        metrics.write("end", step=2)
        lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines == [{"kind": "train", "step": 1, "loss": 5.5}, {"kind": "end", "step": 2}]
    with Metrics(None) as silent:
        silent.write("train", step=1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_by_name() -> None:
    with (
        pytest.raises(OSError, match=r"cannot write /dev/full: No space left on device"),
        Metrics(Path("/dev/full")) as metrics,
    ):
        metrics.write("train", step=1)


def test_a_picture(tmp_path: Path) -> None:
    draw(tmp_path / "loss.png", [(1, 5.5), (20, 3.0)], [(20, 3.1)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
