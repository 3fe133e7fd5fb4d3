"""A GPT's block and its whole training step on one rank and on all, in tokens a second and in bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from shardgrad.bench.timing import Spread, in_turns, ratio, slowest_rank
from shardgrad.comm.shm.register import register
from shardgrad.train.model import GPT

PARTS = ("block", "training step")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model and its batch."""

    layers: int = 2
    d_model: int = 256
    heads: int = 8
    seq_len: int = 128
    batch: int = 8
    vocab: int = 512
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


@dataclass(frozen=True, slots=True)
class Row:
    """One part of the model on so many ranks.

    rate: tokens a second. speedup: over one rank. peak: bytes of tensors at the height of a step, parameters, gradients
    and the optimizer's state included, of the rank with most: what torch's allocator handed out, not what process
    groups map for themselves.
    """

    part: str
    ranks: int
    time: Spread
    rate: Spread
    speedup: Spread
    peak: int


def measure(shape: Shape, backend: str, rounds: int) -> list[Row]:
    """Measure on the ranks of the default group, which is gloo's, and on the first alone. Every rank calls it alike."""
    register()
    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    groups = {1: dist.new_group([0])}
    if ranks > 1:
        groups[ranks] = dist.new_group(range(ranks), backend=backend)
    steps: dict[tuple[str, int], Callable[[], None]] = {}
    peaks: dict[tuple[str, int], int] = {}
    for count in sorted(groups):
        taking_part = first or count > 1
        mesh = DeviceMesh.from_group(groups[count], "cpu", mesh_dim_names=("tp",)) if taking_part else None
        for part in PARTS:
            dist.barrier()
            peak = 0
            steps[part, count] = _idle
            if mesh is not None:
                steps[part, count], peak = _made_and_weighed(_MAKERS[part], shape, mesh)
            peaks[part, count] = round(slowest_rank([float(peak)])[0])
    times = {
        key: found[0]
        for key, found in in_turns(steps, rounds, turn=0.1, meet=dist.barrier, slowest=slowest_rank).items()
    }
    return [
        Row(
            part,
            count,
            Spread.of(times[part, count]).scaled(1e3),
            Spread.of([shape.tokens / seconds for seconds in times[part, count]]),
            ratio(times[part, 1], times[part, count]),
            peaks[part, count],
        )
        for part, count in sorted(times)
    ]


def _idle() -> None:
    """What a rank does that has no part."""


def _model(shape: Shape, mesh: DeviceMesh) -> GPT:
    torch.manual_seed(0)
    return GPT(
        layers=shape.layers, heads=shape.heads, d_model=shape.d_model, seq_len=shape.seq_len, vocab=shape.vocab,
        mesh=mesh, dtype=shape.dtype,
    )  # fmt: skip


def _block(shape: Shape, mesh: DeviceMesh) -> Callable[[], None]:
    """Forward and backward of one block: norms, attention, feed-forward; the stream is sharded along the sequence."""
    block = _model(replace(shape, layers=1), mesh).blocks[0]
    part = len(range(shape.seq_len)[mesh.get_local_rank() :: mesh.size()])  # seq_len divides: checked by the command
    x = torch.randn(shape.batch, part, shape.d_model, dtype=shape.dtype).requires_grad_()
    dy = torch.randn_like(x)
    leaves = [x, *block.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        block(x, shape.seq_len).backward(dy)

    return step


def _training_step(shape: Shape, mesh: DeviceMesh) -> Callable[[], None]:
    """Forward, loss, backward and AdamW on random tokens."""
    model = _model(shape, mesh)
    ids, targets = torch.randint(shape.vocab, (2, shape.batch, shape.seq_len)).unbind()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(ids, targets).backward()
        optimizer.step()

    return step


_MAKERS: dict[str, Callable[[Shape, DeviceMesh], Callable[[], None]]] = {
    "block": _block,
    "training step": _training_step,
}


def _made_and_weighed(
    make: Callable[[Shape, DeviceMesh], Callable[[], None]], shape: Shape, mesh: DeviceMesh
) -> tuple[Callable[[], None], int]:
    """A step, and the most bytes that torch had allocated at once for it: making the model and two steps, since
    gradients and the optimizer's state are there from the first on."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = make(shape, mesh)
        for _ in range(2):
            step()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return step, _most([event for event in events if event.get("name") == "[memory]"])


def _most(events: list[dict[str, Any]]) -> int:
    """The largest sum of allocations less frees, in the order of time."""
    total = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        most = max(most, total)
    return most


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]


def draw(rows: list[Row], path: Path, note: str = "") -> None:
    """Tokens a second of each part, a bar for each number of ranks; note: of the machine."""
    from shardgrad import charts  # matplotlib takes its time

    with charts.chart(path, "A GPT on one rank and on several", (3.2 * len(PARTS), 3.6), note) as figure:
        for panel, part in zip(figure.subplots(1, len(PARTS), squeeze=False)[0], PARTS):
            these = [row for row in rows if row.part == part]
            errors = [[r.rate.median - r.rate.low for r in these], [r.rate.high - r.rate.median for r in these]]
            names = [f"{row.ranks} rank{'s' if row.ranks > 1 else ''}" for row in these]
            look: dict[str, Any] = {"color": charts.SERIES[0], "capsize": 3}
            ink = {"color": charts.INK, "markerfacecolor": charts.INK}
            bars = panel.bar(names, [row.rate.median for row in these], 0.6, yerr=errors, error_kw=ink, **look)
            panel.bar_label(bars, [f"{row.rate.median:,.0f}" for row in these], label_type="center", color="white")
            charts.plain(panel, "y", f"{part}, tokens/s")
            charts.counts(panel.yaxis)
