"""Run a program on several ranks, forked from a process that has already imported what such programs import.

To start them by torchrun instead would import torch once a rank, some seconds of a core each.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import shardgrad

PRELOADED = ["torch", "torch.distributed.device_mesh", "shardgrad.train.launch", *sorted(set(shardgrad._HOME.values()))]


def run(
    program: Path, ranks: int, timeout: float, arguments: Sequence[object] = (), directory: Path | None = None
) -> tuple[int | None, str]:
    """The first exit status that is not 0, else None if a rank had to be ended, else 0; and what all ranks printed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the preloading process starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    folder = tempfile.TemporaryDirectory()
    logs = [Path(folder.name) / f"{rank}.log" for rank in range(ranks)]
    argv = [str(program), *map(str, arguments)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        processes.append(context.Process(target=_rank, args=(argv, environment, str(log), str(directory or "."))))
    for process in processes:
        process.start()
    until = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < until:
        time.sleep(0.02)
        if any(process.exitcode for process in processes):
            until = min(until, time.monotonic() + 10)  # the others have so long to tell what they see
    failed = next((process.exitcode for process in processes if process.exitcode), None)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    told = "".join(f"[rank {rank}]\n{log.read_text(errors='replace')}" for rank, log in enumerate(logs) if log.exists())
    if late:
        told += f"\nstill running at the end: ranks {', '.join(map(str, late))}"
    folder.cleanup()
    return (failed if failed or late else 0), told


def _rank(argv: list[str], environment: dict[str, str], log: str, directory: str) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = argv
    import torch

    torch.set_num_threads(1)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
