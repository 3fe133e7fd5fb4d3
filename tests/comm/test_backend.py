"""What is set for NCCL before it starts."""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from shardgrad.comm.backend import let_nccl_go_first
from shardgrad.comm.rendezvous import start_process_group

ROOT = Path(__file__).parents[2]
NAME = "TORCH_NCCL_HIGH_PRIORITY"


@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({NAME: "0"}, "0"), ({NAME: ""}, "")])
def test_what_the_user_has_set_stays(given: dict[str, str], expected: str) -> None:
    environment = {**given, "OTHER": "x"}
    let_nccl_go_first(environment)
    assert environment == {NAME: expected, "OTHER": "x"}


@pytest.mark.parametrize(("backend", "expected"), [("nccl", "1"), ("gloo", None)])
def test_programs_set_it_before_the_group_starts(
    backend: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setenv(NAME, "1")  # so that what is set below is undone
    monkeypatch.delenv(NAME)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: seen.append(os.environ.get(NAME)))
    start_process_group(backend, timedelta(seconds=5))
    assert seen == [expected]


@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({NAME: "0"}, "0")])
@pytest.mark.parametrize("script", ["multinode.sh", "slurm.sbatch"])
def test_launchers_pass_it_on(script: str, given: dict[str, str], expected: str, tmp_path: Path) -> None:
    """The scripts run with stand-ins for Python and SLURM, which say what they were given."""
    for name, text in {
        "python": f'case "$1" in -c) echo 127.0.0.1 ;; *) echo "{NAME}=${NAME}" ;; esac',
        "srun": f'echo "{NAME}=${NAME}"',
        "scontrol": "echo host",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    arguments = ["127.0.0.1", "2", "1", "x.py"] if script == "multinode.sh" else ["x.py"]
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    slurm = {"SLURM_JOB_NODELIST": "host", "SLURM_CPUS_PER_TASK": "4", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        env={**environment, **slurm, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{NAME}={expected}" in done.stdout
