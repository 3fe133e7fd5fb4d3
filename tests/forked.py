"""Run a program on several ranks, forked from a process that has already imported what such programs import.

To start them by torchrun instead would import torch once a rank, some seconds of a core each.
"""

from __future__ import annotations

import gc
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
PRELOADED += ["transformers.models.llama.modeling_llama"]  # most of what a model of transformers imports: 2 s a rank


def run(
    program: Path, ranks: int, timeout: float, arguments: Sequence[object] = (), directory: Path | None = None
) -> tuple[int | None, str]:
    """The first exit status that is not 0, else None if a rank had to be ended, else 0; and what all ranks printed."""
    status, printed, late = _run(program, ranks, timeout, arguments, directory)
    told = "".join(f"[rank {rank}]\n{text}" for rank, text in enumerate(printed))
    if late:
        told += f"\nstill running at the end: ranks {', '.join(map(str, late))}"
    return status, told


def command(
    ranks: int, *arguments: object, timeout: float = 200, directory: Path | None = None
) -> tuple[int | None, list[str]]:
    """The ranks of a `shardgrad` command, as the command itself would start them; what each wrote to stdout."""
    program = Path(shardgrad.__file__).with_name("__main__.py")
    status, printed, _ = _run(program, ranks, timeout, arguments, directory, errors_too=False)
    return status, printed


def _run(
    program: Path,
    ranks: int,
    timeout: float,
    arguments: Sequence[object],
    directory: Path | None,
    errors_too: bool = True,
) -> tuple[int | None, list[str], list[int]]:
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
        errors = log if errors_too else log.with_suffix(".errors")
        given = (argv, environment, str(log), str(errors), str(directory or "."))
        processes.append(context.Process(target=_rank, args=given))
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
    printed = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    folder.cleanup()
    return (failed if failed or late else 0), printed, late


def _rank(argv: list[str], environment: dict[str, str], log: str, errors: str, directory: str) -> None:
    for path, stream in ((log, 1), (errors, 2)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = argv
    gc.freeze()  # else a collection writes to every page shared with the process it was forked from
    import torch

    torch.set_num_threads(1)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
