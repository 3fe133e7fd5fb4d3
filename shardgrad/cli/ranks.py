"""Start the ranks of a command: the same command line, once a rank, by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

import typer


def inside() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start(ranks: int) -> None:
    """Run this very command line on so many ranks of this machine, and end with its status.

    Returns at once on a rank that torchrun has started: the command then goes on as that rank.
    """
    if inside():
        return
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*torchrun, "-m", "shardgrad.cli", *sys.argv[1:]], env=environment, check=False)
    raise typer.Exit(done.returncode)
