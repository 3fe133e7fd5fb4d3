"""The time that a process spends in communication."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function


class CommTimer:
    """How long this process was kept by collectives, by starting them and by waiting for them, and how many there were.

    *Over NCCL* a wait keeps the stream, and the host goes on. So there what counts is the time between two CUDA events
    on the current stream, one before each start or wait and one after it: how long the device had nothing to compute
    because of them (and of a start, how long the host took where the device waited for it).

    named: whether torch.profiler records what is started and what is waited for, as "start all-reduce of dX over tp".
    """

    def __init__(self, named: bool = False) -> None:
        self.count = 0
        self.named = named
        self.over = False
        self._seconds = 0.0
        self._spans: list[tuple[Any, Any]] = []  # of events, where the device may not have come to the second

    @property
    def seconds(self) -> float:
        """Inside the block, what is known by now: the host never waits for the device. After it, all: over NCCL the
        host waits until the device has come to the last of these collectives."""
        spans, self._spans = self._spans, []
        for began, ended in spans:
            if self.over:
                ended.synchronize()
            if ended.query():
                self._seconds += began.elapsed_time(ended) * 1e-3
            else:
                self._spans.append((began, ended))
        return self._seconds

    def __repr__(self) -> str:
        return f"CommTimer({self.count} collectives, {self.seconds:.3g} s)"

    def add(self, seconds: float) -> None:
        """Count time of the host."""
        self._seconds += seconds

    def add_span(self, began: Any, ended: Any) -> None:
        """Count the device's time between two events."""
        self._spans.append((began, ended))


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
        timer.over = True


def event_class(backend: Any) -> Any:
    """The events by which the collectives of a backend are timed; None where a wait keeps the host."""
    return torch.cuda.Event if type(backend).__name__.startswith("ProcessGroupNCCL") else None  # torch has several


def timed(call: Callable[[], Any], label: str, *, starts: bool, backend: Any) -> Any:
    """What `call` returns; the open timers count its time, and it itself if it starts a collective.

    backend: what the call is of.
    """
    event = event_class(backend)
    began = time.perf_counter() if event is None else _recorded(event)
    if any(timer.named for timer in timers):
        with record_function(f"{'start' if starts else 'wait for'} {label}"):
            result = call()
    else:
        result = call()
    ended = time.perf_counter() if event is None else _recorded(event)
    for timer in timers:
        if event is None:
            timer.add(ended - began)
        else:
            timer.add_span(began, ended)
        timer.count += starts
    return result


def _recorded(event: Any) -> Any:
    made = event(enable_timing=True)
    made.record()
    return made
