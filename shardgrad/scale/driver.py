"""Run the cells of an experiment, one after another, each on ranks of its own, and write down what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
import torch.distributed as dist

from shardgrad.hardware import memory
from shardgrad.layout.units import format_si
from shardgrad.scale import machine
from shardgrad.scale.cell import Cell
from shardgrad.scale.config import Experiment, Planned
from shardgrad.scale.results import Line, Results, summed

_REASON_LINES = 6
_END_S = 10.0  # how long torchrun is given to end its ranks
_RANK = 10**8  # bytes of a process that has imported torch
_BUILTIN = ("gloo", "nccl", "mpi", "ucc", "xccl")


class Stopped(Exception):
    """The driver is to end, by the user or the system."""


class Show(Protocol):
    """Tells of progress."""

    def begin(self, planned: Planned, at: int) -> None: ...
    def end(self, planned: Planned, line: Line, at: int, *, again: bool) -> None: ...


def run(experiment: Experiment, results: Results, show: Show, *, retry: bool = False) -> list[Line]:
    """Results of all cells, in their order: those that are there already, and the others run now.

    retry: run once more what failed or was skipped.

    Raises:
        Stopped: by SIGINT or SIGTERM; what was finished is written.
    """
    config = experiment.config.run
    measuring = {"seed": config.seed, "warmup": config.warmup, "repeats": config.repeats}
    about = {"versions": machine.versions(), "machine": machine.machine(), "commit": machine.commit()}
    lines = []
    with _stoppable():
        for at, planned in enumerate(experiment.planned):
            found = results.latest(planned.cell.key, measuring)
            if found is not None and (found["status"] == "ok" or not retry):
                show.end(planned, found, at, again=True)
            else:
                show.begin(planned, at)
                found = {
                    "key": planned.cell.key,
                    "name": planned.name,
                    "cell": planned.cell.model_dump(),
                    "measuring": measuring,
                    **about,
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    "load": list(os.getloadavg()),
                    **_cell(planned.cell, {**measuring, "timeout_s": config.timeout_s}),
                }
                results.add(found)
                show.end(planned, found, at, again=False)
            lines.append(found)
    return lines


def _cell(cell: Cell, settings: dict[str, Any]) -> Line:
    """Run one cell; its figures, or why there are none."""
    reason = unavailable(cell)
    if reason is not None:
        return {"status": "skipped", "reason": reason}
    with TemporaryDirectory(prefix="shardgrad-scale-") as name:
        folder = Path(name)
        (folder / "cell.json").write_text(json.dumps({"cell": cell.model_dump(), **settings}))
        start = time.monotonic()
        status = _start(cell, folder, settings["timeout_s"])
        ranks = [folder / f"rank-{rank}.json" for rank in range(cell.world)]
        took = {"wall_seconds": round(time.monotonic() - start, 3)}
        if status == 0 and all(path.exists() for path in ranks):
            return {"status": "ok", **took, **summed([json.loads(path.read_text()) for path in ranks])}
        return {"status": "failed", **took, **_why(folder, status, settings["timeout_s"])}


def unavailable(cell: Cell) -> str | None:
    """Why this machine or this torch cannot run a cell at all; None if it can."""
    if cell.device == "cuda" and torch.cuda.device_count() < cell.world:
        return f"{cell.world} GPUs are needed, {torch.cuda.device_count()} are here"
    if cell.device == "cpu" and (needed := _least_bytes(cell)) > (here := memory()):
        return f"at least {format_si(needed, 'B')} of memory are needed, {format_si(here, 'B')} are here"
    name = str(cell.backend)
    if name not in dist.Backend.backend_list:
        return f"torch.distributed has no backend {name!r} here; it has {', '.join(dist.Backend.backend_list)}"
    if name in _BUILTIN and not getattr(dist, f"is_{name}_available", lambda: False)():
        return f"this torch was built without {name}"
    return None


def _least_bytes(cell: Cell) -> int:
    """What the ranks of a cell hold together at the least: tensors with their gradients, and torch once a rank."""
    held = 2 * cell.elements() * getattr(torch, cell.dtype).itemsize
    if cell.kind == "step":
        from shardgrad.scale import training

        config = training.read(cell, cell.sizes, cell.world)
        held = training.least_bytes(config, cell.world)
    return held + cell.world * _RANK


def _start(cell: Cell, folder: Path, timeout: float) -> int | None:
    """Run the cell's ranks under torchrun; the exit status, or None if they ran out of time."""
    group = [sys.executable, "-m", "shardgrad.scale.group", "--standalone", f"--nproc-per-node={cell.world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cell.threads)}
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [*group, "-m", "shardgrad.scale.worker", str(folder)],
            stdout=errors,
            stderr=errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is the driver's; it then ends the ranks
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its ranks; where it does not, it is killed, and they die with it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _why(folder: Path, status: int | None, timeout: float) -> Line:
    """What the rank that failed first said, and the last lines of standard error."""
    stderr = (folder / "stderr").read_text(errors="replace").splitlines()
    last = [line for line in stderr if line.strip()][-_REASON_LINES:]
    errors = sorted((json.loads(path.read_text()) for path in folder.glob("rank-*.error")), key=lambda e: e["time"])
    if status is None:
        reason = f"ran out of time after run.timeout_s = {timeout:g} s"
    elif errors:
        reason = f"rank {errors[0]['rank']}: {errors[0]['error']}"
    else:
        signals = [line.strip() for line in stderr if "Signal" in line or "exitcode" in line]
        reason = signals[-1] if signals else f"torchrun ended with status {status}"
    return {"reason": reason, "stderr": last}


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Stopped`, so that the cell under way is ended in order."""

    def stop(number: int, _: object) -> None:
        raise Stopped(signal.Signals(number).name)

    before: dict[int, Callable[..., Any] | int | None] = {}
    for one in (signal.SIGINT, signal.SIGTERM):
        before[int(one)] = signal.signal(one, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
