"""torchrun brings a job back after kill -9 of a rank, and it ends with the bits of one that nobody killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_resume import configured, go, losses, own, same_bits

from shardgrad.testing import distributed
from shardgrad.train import folder
from shardgrad.train.config import Run, Sample, Train
from shardgrad.train.metrics import read

ROOT = Path(__file__).parents[2]
TRAIN = Train(steps=30, batch=4, lr=0.01, warmup=1, log_every=3, eval_every=11, save_every=10, eval_batches=1)
SAMPLE = Sample(tokens=0)


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        if parent == process:
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job on two ranks, of which the second was killed as soon as there was a checkpoint."""
    where = tmp_path_factory.mktemp("killed")
    config = configured(
        where, train=TRAIN, run=Run(dir=str(where / "run"), seed=3), sample=SAMPLE
    )  # restarts need no run.resume
    (where / "job.yaml").write_text(config.to_yaml())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    job = subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / "launch" / "train.py"), str(where / "job.yaml")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + 100
        ranks: list[int] = []
        while not folder.checkpoints(where / "run"):
            ranks = ranks if len(ranks) == 2 else children(job.pid)
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.002)
        os.kill(ranks[-1], signal.SIGKILL)
        told, _ = job.communicate(timeout=150)
    finally:
        for process in [job.pid, *children(job.pid)] if job.poll() is None else []:
            os.kill(process, signal.SIGKILL)
    assert job.returncode == 0, told
    assert "going on after step" in told
    return where


@pytest.mark.slow
@distributed(world_size=[2], timeout=120)
def test_killed_and_restarted(world_size: int, killed: Path, tmp_path: Path) -> None:
    whole = own(tmp_path, "whole")
    go(configured(whole, train=TRAIN, sample=SAMPLE), world_size)
    assert not (killed / "run-2").exists()
    starts = [line["step"] for line in read(killed / "run" / "metrics.jsonl") if line["kind"] == "start"]
    assert starts[0] == 0
    assert len(starts) == 2
    assert starts[1] in (10, 20)
    same_bits(folder.checkpoint(whole / "run", 30), folder.checkpoint(killed / "run", 30))
    assert losses(killed / "run") == losses(whole / "run")
