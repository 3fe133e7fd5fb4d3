"""A training job on two hosts survives the loss of one; see two_hosts.sh, which can be run by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif("SHARDGRAD_TWO_HOSTS" not in os.environ, reason="takes a minute: set SHARDGRAD_TWO_HOSTS=1")
def test_one_of_two_hosts_is_lost_and_the_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_hosts.sh")
    environment = {**os.environ, "PYTHON": sys.executable, "STEPS": "60"}
    done = subprocess.run([str(script), str(tmp_path)], capture_output=True, text=True, timeout=500, env=environment)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    starts = [line["step"] for line in lines if line["kind"] == "start"]
    assert starts[-1] > 0, starts  # from a checkpoint, not from the beginning
    assert starts[-1] % 20 == 0
    assert lines[-1]["kind"] == "end"
    assert lines[-1]["step"] == 60
