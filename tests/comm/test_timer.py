"""The timer of communication: the host's time, or over NCCL the device's, which it never waits for inside its block."""

from __future__ import annotations

import time
from typing import Any

import pytest

import shardgrad as sg
from shardgrad.comm import timer
from shardgrad.comm.timer import timed


class Device:
    """Events of a device that comes to them when it is told to."""

    def __init__(self) -> None:
        self.recorded: list[Event] = []
        self.done = 0
        self.waited = 0

    def __call__(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self._device, self.at = device, -1

    def record(self) -> None:
        self.at = len(self._device.recorded)
        self._device.recorded.append(self)

    def query(self) -> bool:
        return self.at < self._device.done

    def synchronize(self) -> None:
        self._device.waited += 1
        self._device.done = max(self._device.done, self.at + 1)

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return 2.0 ** (self.at // 2)  # ms; the n-th call takes 2^n


class ProcessGroupNCCL:
    """A backend as torch calls its own."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(timer.torch.cuda, "Event", made)
    return made


def call(result: object = 5) -> Any:
    return timed(lambda: result, "all-reduce over tp", starts=True, backend=ProcessGroupNCCL())


def test_inside_the_block_the_host_does_not_wait(device: Device) -> None:
    with sg.comm_timer() as clock:
        assert call() == 5
        assert clock.seconds == 0
        call()
        device.done = 2
        assert clock.seconds == 1e-3
        assert clock.seconds == 1e-3
        device.done = 3  # the second call has begun
        assert clock.seconds == 1e-3
        assert device.waited == 0
        call()
    assert device.waited == 0
    assert clock.seconds == pytest.approx(7e-3, rel=1e-12)
    assert device.waited == 2
    assert clock.seconds == pytest.approx(7e-3, rel=1e-12)
    assert clock.count == 3
    assert repr(clock) == "CommTimer(3 collectives, 0.007 s)"


def test_every_open_timer_counts_every_call(device: Device) -> None:
    with sg.comm_timer() as outer:
        call()
        with sg.comm_timer(named=True) as inner:
            call()
        call()
    assert outer.seconds == pytest.approx(7e-3, rel=1e-12)
    assert inner.seconds == pytest.approx(2e-3, rel=1e-12)
    assert (outer.count, inner.count) == (3, 1)


def test_events_stand_around_the_call(device: Device) -> None:
    with sg.comm_timer():
        timed(lambda: device.recorded.append("the call"), "", starts=False, backend=ProcessGroupNCCL())  # type: ignore[arg-type]
    assert [one if isinstance(one, str) else "event" for one in device.recorded] == ["event", "the call", "event"]


def test_where_a_wait_keeps_the_host_its_time_counts(device: Device) -> None:
    with sg.comm_timer() as clock:
        timed(lambda: time.sleep(0.01), "wait", starts=False, backend=object())
        assert clock.seconds >= 0.01
    assert clock.count == 0
    assert device.recorded == []
