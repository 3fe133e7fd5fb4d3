"""What the host does for a step besides its products: on the `fake` backend, where nothing is sent or awaited."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.bench import peers
from shardgrad.bench.timing import Spread, in_turns, ratio
from shardgrad.comm import shim

SIZE = (8, 64, 256)
RANKS = 2
_TURN_S = 0.01  # tens of steps, so that all but the first find caches as their own steps left them


@dataclass(frozen=True, slots=True)
class Row:
    """One contender, in microseconds a step.

    wall: median over rounds. cpu: of the thread's own processor time, which other programs' load hardly touches; least:
    its least value. to_plain, to_hand: the medians of the rounds' ratios of cpu.
    """

    name: str
    wall: Spread
    cpu: Spread
    least: float
    to_plain: Spread
    to_hand: Spread


def measure(names: list[str], rounds: int, dtype: torch.dtype = torch.float32) -> list[Row]:
    """Measure one process as the first of two ranks. Joins a process group of its own, and leaves it."""
    tokens, d, m = SIZE
    shim.join_imagined(0, RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
        steps = {name: peers.step_of(name, d, m, dtype, mesh, tokens) for name in names}
        # Backward runs in the thread that calls it, on CPUs: thread_time has all of it.
        found = in_turns(steps, rounds, turn=_TURN_S, clocks=(time.perf_counter, time.thread_time), warm_up=20)
    finally:
        peers.forget_groups()
        dist.destroy_process_group()
    plain, hand = found[peers.LOCAL][1], found[peers.HAND][1]
    return [
        Row(
            name,
            Spread.of(wall).scaled(1e6),
            Spread.of(cpu).scaled(1e6),
            1e6 * min(cpu),
            ratio(cpu, plain),
            ratio(cpu, hand),
        )
        for name, (wall, cpu) in found.items()
    ]
