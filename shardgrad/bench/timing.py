"""Contenders timed against each other: in the same processes, in turns, so that other load meets all."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the two values between which the true median lies with 95 % confidence, from order statistics.

    Of fewer than six values, the least and the largest: they hold it with less confidence, 94 % of five, 75 % of three.
    """

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        skip = _outside(len(ordered))
        return Spread(median(ordered), ordered[skip], ordered[-1 - skip])

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def text(self, digits: int = 0) -> str:
        return f"{self.median:,.{digits}f} [{self.low:,.{digits}f}, {self.high:,.{digits}f}]"


def _outside(count: int) -> int:
    """How many values to skip at each end: as many as leave the true median outside in at most 2.5 % of samples.

    The number of values below the true median is binomial with p = 1/2 (Conover, Practical Nonparametric Statistics).
    """
    tail, skip = 2.0**-count, 0  # of at most `skip` values below the true median
    while (tail := tail + math.comb(count, skip + 1) / 2**count) <= 0.025:
        skip += 1
    return skip


def ratio(times: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times as long, of values taken in the same rounds: the median of each round's ratio."""
    return Spread.of([one / other for one, other in zip(times, base, strict=True)])


def in_turns(
    contenders: Mapping[Any, Callable[[], object]],
    rounds: int,
    *,
    turn: float = 0.02,
    meet: Callable[[], object] = lambda: None,
    slowest: Callable[[list[float]], list[float]] = lambda seconds: seconds,
    clocks: Sequence[Clock] = (time.perf_counter,),
    warm_up: int = 2,
) -> dict[Any, list[list[float]]]:
    """Seconds of one call of each contender: for each of `clocks`, one value a round.

    In every round each contender has a turn of about `turn` seconds (at most 200 calls); each round begins with the
    next one.

    meet: what ranks do before a turn, to begin it together. slowest: of every rank's figures, the largest.
    """
    for call in contenders.values():
        meet()
        for _ in range(warm_up):
            call()
    # As many calls on every rank: by what the slowest needs.
    once = slowest([_turn(call, 1, meet, clocks[:1])[0] for call in contenders.values()])
    calls = {name: max(1, min(200, int(turn / seconds))) for name, seconds in zip(contenders, once)}
    names = list(contenders)
    found: dict[Any, list[list[float]]] = {name: [[] for _ in clocks] for name in names}
    with _no_collector():
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                for values, seconds in zip(found[name], _turn(contenders[name], calls[name], meet, clocks)):
                    values.append(seconds)
            gc.collect()
    flat = iter(slowest([seconds for name in names for values in found[name] for seconds in values]))
    return {name: [[next(flat) for _ in values] for values in found[name]] for name in names}


def _turn(call: Callable[[], object], count: int, meet: Callable[[], object], clocks: Sequence[Clock]) -> list[float]:
    meet()
    begun = [clock() for clock in clocks]
    for _ in range(count):
        call()
    return [(clock() - start) / count for clock, start in zip(clocks, begun)]


@contextmanager
def _no_collector() -> Any:
    """A block in which Python's garbage collector interrupts no turn: it has its time between rounds."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through again and again
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def slowest_rank(seconds: list[float]) -> list[float]:
    """Element by element, the largest of all ranks of the default group."""
    tensor = torch.tensor(seconds, dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()
