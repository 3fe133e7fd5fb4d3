"""One tensor-parallel step, forward and backward, beside what others offer for it: on gloo and on shared memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.bench import peers
from shardgrad.bench.timing import Spread, in_turns, ratio, slowest_rank
from shardgrad.comm.shm.register import register

BACKENDS = ("gloo", "shm")
Size = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one backend ("" for the local products alone), at one size [tokens, d, hidden] and dtype.

    time: microseconds a step, of the slowest rank. to_hand: how many times as long as the hand-written pair on the same
    backend. share: of the step, that the local products alone take. to_ours: how many times as long as shardgrad takes
    on the same backend; to_ours_on_shm: as it takes on shared memory, which its launchers choose on one host.
    """

    dtype: str
    size: Size
    name: str
    backend: str
    time: Spread
    to_hand: Spread | None
    share: Spread | None
    to_ours: Spread | None
    to_ours_on_shm: Spread | None


@dataclass(frozen=True, slots=True)
class Found:
    """All rows, and what was left out, in words."""

    rows: list[Row]
    left_out: list[str]

    def against(self) -> dict[tuple[str, str], tuple[float, float | None]]:
        """For each contender and backend, how many times as long as shardgrad it takes, geometric mean of all cases:
        shardgrad on the same backend, and on shared memory (None if that was not measured)."""
        ratios: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
        for row in self.rows:
            if row.to_ours is not None and row.name != peers.OURS:
                on_shm = row.to_ours_on_shm.median if row.to_ours_on_shm is not None else None
                ratios.setdefault((row.name, row.backend), []).append((row.to_ours.median, on_shm))
        return {
            key: (
                geometric_mean([same for same, _ in found]),
                geometric_mean([on for _, on in found if on is not None]) if found[0][1] is not None else None,
            )
            for key, found in ratios.items()
        }

    def as_json(self) -> dict[str, object]:
        against = [
            {"name": name, "backend": backend, "same backend": same, "shardgrad on shm": on_shm}
            for (name, backend), (same, on_shm) in self.against().items()
        ]
        return {
            "unit": "µs",
            "rows": [asdict(row) for row in self.rows],
            "to shardgrad": against,
            "notes": self.left_out,
        }


def measure(
    sizes: Sequence[Size],
    dtypes: Sequence[torch.dtype],
    rounds: int,
    backends: Sequence[str] = BACKENDS,
    names: Sequence[str] = tuple(peers.PEERS),
    turn: float = 0.02,
) -> Found:
    """Measure on the ranks of the default group, which is gloo's. Every rank must call it alike.

    Each contender gets a group of each backend, in one and the same processes; rounds go through all of them.
    """
    register()
    peers.warnings_off()
    left_out = [text for name in names if (text := peers.missing(name))]
    names = [name for name in names if peers.missing(name) is None]
    ranks = range(dist.get_world_size())
    meshes = {
        backend: DeviceMesh.from_group(dist.new_group(ranks, backend=backend), "cpu", mesh_dim_names=("tp",))
        for backend in backends
    }
    rows: list[Row] = []
    for dtype in dtypes:
        for size in sizes:
            tokens, d, m = size
            steps: dict[tuple[str, str], Callable[[], None]] = {}
            for name in names:
                for backend in backends if peers.PEERS[name].communicates else backends[:1]:
                    step = peers.step_of(name, d, m, dtype, meshes[backend], tokens)
                    reason = _try(step)
                    if reason is None:
                        steps[name, backend if peers.PEERS[name].communicates else ""] = step
                    elif reason not in left_out:
                        left_out.append(f"{name} on {backend} is left out: {reason}")
            times = in_turns(steps, rounds, turn=turn, meet=dist.barrier, slowest=slowest_rank)
            rows += _rows(str(dtype).removeprefix("torch."), size, {key: found[0] for key, found in times.items()})
    peers.forget_groups()
    return Found(rows, list(dict.fromkeys(left_out)))


def _try(step: Callable[[], None]) -> str | None:
    """Why a contender cannot run on a backend, on all ranks if on one; None if it can."""
    reason = None
    try:
        step()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    failed = slowest_rank([0.0 if reason is None else 1.0])[0]
    return reason if reason is not None or not failed else "it failed on another rank"


def _rows(dtype: str, size: Size, times: dict[tuple[str, str], list[float]]) -> list[Row]:
    local, on_shm = times.get((peers.LOCAL, "")), times.get((peers.OURS, "shm"))
    rows = []
    for (name, backend), seconds in times.items():
        hand, ours = times.get((peers.HAND, backend)), times.get((peers.OURS, backend))
        rows.append(
            Row(
                dtype,
                size,
                name,
                backend,
                Spread.of(seconds).scaled(1e6),
                ratio(seconds, hand) if hand else None,
                ratio(local, seconds) if local and name != peers.LOCAL else None,
                ratio(seconds, ours) if ours else None,
                ratio(seconds, on_shm) if on_shm and backend else None,
            )
        )
    return rows


def draw(found: Found, path: Path, note: str = "") -> None:
    """How many times as long as the hand-written pair each contender takes, with its interval; a panel a backend.

    note: of the machine.
    """
    from shardgrad import charts  # matplotlib takes its time

    rows = [row for row in found.rows if row.to_hand is not None and row.name != peers.HAND]
    backends = list(dict.fromkeys(row.backend for row in rows))
    cases = list(dict.fromkeys((row.dtype, row.size) for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    title = "A step of Linear–GELU–Linear, over the hand-written one"
    with charts.chart(path, title, (9, 1.2 + 2.8 * len(backends)), note) as figure:
        axes = figure.subplots(len(backends), 1, sharex=True, squeeze=False)[:, 0]
        for panel, backend in zip(axes, backends):
            for at, name in enumerate(names):
                these = {(r.dtype, r.size): r.to_hand for r in rows if (r.name, r.backend) == (name, backend)}
                places = [cases.index(case) + 0.12 * (at - (len(names) - 1) / 2) for case in these]
                charts.spreads(panel, places, these.values(), at, name, line=False)
            charts.line_at(panel, 1)
            charts.plain(panel, "y", backend)
            ends = [end for row in rows if row.backend == backend and (s := row.to_hand) for end in (s.low, s.high)]
            charts.ratios(panel, ends)
        labels = [f"{dtype}\n{' × '.join(map(str, size))}" for dtype, size in cases]
        axes[-1].set_xticks(range(len(cases)), labels, fontsize=7.5)
        charts.legend_of(figure, axes[0])
