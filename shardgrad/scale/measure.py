"""What a rank measures of its work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardgrad.comm.timer import comm_timer
from shardgrad.comm.trace import trace_collectives
from shardgrad.scale.work import Work


@dataclass(frozen=True)
class Measured:
    """Of one rank. seconds: of each repeat; communicating: the part of each spent starting collectives and blocked on
    them (over NCCL, that the device was kept by them); predicted, traced: bytes sent in one step, by operation and
    axis.
    """

    seconds: list[float]
    communicating: list[float]
    predicted: dict[str, int]
    traced: dict[str, int]
    memory: int | None
    flops: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(work: Work, device: torch.device, warmup: int, repeats: int, before: int | None) -> Measured:
    """Run and time the work; called on every rank of the default process group.

    before: bytes of memory that the process had before it built the work, or None where that is not known.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing
    _forget_peak(device)
    for _ in range(warmup):
        work.step()
    with trace_collectives() as traced:
        work.step()
    seconds, communicating = [], []
    for _ in range(repeats):
        synchronize()
        dist.barrier()
        with comm_timer() as clock:
            start = time.perf_counter()
            work.step()
            synchronize()
            seconds.append(time.perf_counter() - start)
        communicating.append(clock.seconds)
    return Measured(
        seconds,
        communicating,
        by_kind((one.operation, one.axis, one.bytes) for one in work.predicted),
        by_kind((one.operation, one.axis, one.bytes) for one in traced),
        _peak(device, before),
        work.flops,
        work.tokens,
    )


def _nothing() -> None:
    pass


def by_kind(moves: Any) -> dict[str, int]:
    """Bytes, or whatever else is counted, by operation and axis, as "all-reduce over tp"."""
    found: dict[str, int] = {}
    for operation, axis, count in moves:
        name = f"{operation} over {axis}"
        found[name] = found.get(name, 0) + count
    return dict(sorted(found.items()))


def resident(key: str = "VmRSS") -> int | None:
    """Bytes of this process in memory, where Linux says; key VmHWM: the most there have been."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found: Mapping[str, str] = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(found[key].split()[0]) * 1024 if key in found else None


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # then what was needed to build counts too
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device, before: int | None) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resident("VmHWM")
    return None if most is None or before is None else max(0, most - before)
