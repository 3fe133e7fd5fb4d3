"""The time that a process spends in communication."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import record_function


class CommTimer:
    """Seconds that this process spent starting collectives and blocked on them, and how many there were.

    On CUDA a wait only orders streams, so this is host time there.

    named: whether torch.profiler records what is started and what is waited for, as "start all-reduce of dX over tp".
    """

    def __init__(self, named: bool = False) -> None:
        self.seconds = 0.0
        self.count = 0
        self.named = named


timers: list[CommTimer] = []  # those open; without any, collectives need not look at the clock


@contextmanager
def comm_timer(named: bool = False) -> Iterator[CommTimer]:
    """Measure the time this process spends in communication inside the block, backward included.

    named: also record for torch.profiler what is started and what is waited for.
    """
    timer = CommTimer(named)
    timers.append(timer)
    try:
        yield timer
    finally:
        timers.remove(timer)


def timed(call: Callable[[], Any], label: str, *, starts: bool) -> Any:
    """What `call` returns; the open timers count its time, and it itself if it starts a collective."""
    began = time.perf_counter()
    if any(timer.named for timer in timers):
        with record_function(f"{'start' if starts else 'wait for'} {label}"):
            result = call()
    else:
        result = call()
    spent = time.perf_counter() - began
    for timer in timers:
        timer.seconds += spent
        timer.count += starts
    return result
