"""How long a collective takes on gloo and on shared memory: in the same processes, in turns, so that ratios hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.shm.register import register

BACKENDS = ("gloo", "shm")
_TURN_S = 0.01  # about how long one backend is measured before the other has its turn


@dataclass(frozen=True, slots=True)
class Row:
    """One operation on one size, in microseconds: the median over all turns, of the slowest rank.

    bytes: of the tensor that every rank holds whole: the input of all-reduce, reduce-scatter and all-to-all, the output
    of all-gather.
    """

    operation: str
    bytes: int
    ranks: int
    gloo: float
    shm: float

    @property
    def ratio(self) -> float:
        """How many times faster shared memory is."""
        return self.gloo / self.shm


_Call = Callable[[Tensor, Tensor, Any], object]
OPERATIONS: dict[str, _Call] = {
    "all-reduce": lambda whole, part, group: dist.all_reduce(whole, group=group),
    "all-gather": lambda whole, part, group: shim.all_gather_single(whole, part, group=group),
    "reduce-scatter": lambda whole, part, group: shim.reduce_scatter_single(part, whole, group=group),
    "all-to-all": lambda whole, part, group: dist.all_to_all_single(torch.empty_like(whole), whole, group=group),
    "broadcast": lambda whole, part, group: dist.broadcast(whole, 0, group=group),
    "barrier": lambda whole, part, group: dist.barrier(group=group),
}


def measure(operations: Sequence[str], sizes: Sequence[int], turns: int, say: Callable[[Row], None]) -> list[Row]:
    """Measure on the ranks of the default group, whatever its backend is. Every rank must call it alike.

    sizes: in bytes, of float32, rounded up to a multiple of the ranks. say: gets each row once it is there.
    """
    register()
    groups = {backend: dist.new_group(backend=backend) for backend in BACKENDS}
    ranks = dist.get_world_size()
    rows = []
    for operation in operations:
        for size in sizes if operation != "barrier" else [0]:
            part = torch.zeros(-(-size // (4 * ranks)))
            whole = torch.zeros(ranks * part.numel())
            seconds = {backend: _turn(operation, whole, part, groups[backend], 3)[1:] for backend in BACKENDS}
            # As many repetitions on every rank: the slowest's of what the first turn says.
            most = _largest(max(statistics.median(times) for times in seconds.values()))
            repeat = max(3, min(200, int(_TURN_S / most)))
            seconds = {backend: [] for backend in BACKENDS}
            for turn in range(turns):
                for backend in BACKENDS if turn % 2 else BACKENDS[::-1]:
                    seconds[backend] += _turn(operation, whole, part, groups[backend], repeat)
            medians = {backend: 1e6 * _largest(statistics.median(times)) for backend, times in seconds.items()}
            row = Row(operation, 4 * whole.numel() if operation != "barrier" else 0, ranks, **medians)
            rows.append(row)
            say(row)
    for group in groups.values():
        dist.destroy_process_group(group)
    return rows


def _turn(operation: str, whole: Tensor, part: Tensor, group: Any, repeat: int) -> list[float]:
    call, times = OPERATIONS[operation], []
    dist.barrier(group=group)
    for _ in range(repeat):
        start = time.perf_counter()
        call(whole, part, group)
        times.append(time.perf_counter() - start)
    return times


def _largest(value: float) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    return [asdict(row) | {"ratio": row.ratio} for row in rows]


def size_text(count: int) -> str:
    """Bytes as people write them: 2 KiB, 8 MiB."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def draw(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """Time over size, one panel an operation, both axes logarithmic; note: of the machine."""
    from shardgrad import charts  # matplotlib takes its time

    names = [name for name in dict.fromkeys(row.operation for row in rows) if name != "barrier"]
    title = f"Collectives of {rows[0].ranks} ranks, float32"
    with charts.chart(path, title, (1.4 + 2.3 * len(names), 3.6), note) as figure:
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, names):
            these = [row for row in rows if row.operation == name]
            for at, backend in enumerate(BACKENDS):
                times = [1e-6 * getattr(row, backend) for row in these]
                panel.plot([row.bytes for row in these], times, label=backend, **charts.look(at))
            charts.plain(panel, "both", name)
            panel.set_xscale("log", base=2)
            panel.set_xticks([row.bytes for row in these], [size_text(row.bytes) for row in these], rotation=40)
            charts.seconds(panel)
        charts.legend_of(figure, panels[0])
