"""What is measured of links and products is the same on all ranks; on CUDA, by events, many calls before one wait."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.ops import measured_costs
from shardgrad.ops.measured_costs import by_events, clock_of
from shardgrad.testing import distributed


@distributed(world_size=[1, 2, 3])
def test_measured_costs_are_the_same_on_all_ranks(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    costs = sg.measure_costs(mesh, repeats=1)
    assert set(costs.links) == ({"tp"} if world_size > 1 else set())
    assert all(rate > 0 for rate in costs.seconds_per_flop.values())
    for link in costs.links.values():
        assert link.latency > 0
        assert 0 <= link.hidden <= 1
        assert link.each >= 0
    everyone: list[object] = [None] * world_size
    torch.distributed.all_gather_object(everyone, costs)
    assert all(one == everyone[0] for one in everyone)


class Device:
    """Stands for torch.cuda: a device that takes `each` ms for a call, and is told of it at once."""

    def __init__(self, each: list[float]) -> None:
        self.done, self.each, self.log = 0.0, iter(each), list[str]()

    def call(self) -> None:
        self.done += next(self.each)
        self.log.append("call")

    def synchronize(self) -> None:
        self.log.append("wait")

    def Event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.done
        self.device.log.append("event")

    def elapsed_time(self, end: Event) -> float:
        assert self.device.log[-1] == "wait", "read before the device is done"
        return end.at - self.at


def test_events_time_many_calls_and_the_host_waits_once() -> None:
    device = Device([100.0, 1.0, 3.0, 4.0, 6.0, 1.0, 1.0])  # ms; the first is not counted
    assert by_events(device.call, 3, 2, device) == pytest.approx([2e-3, 5e-3, 1e-3])
    assert device.log == ["call", "wait", "event", *3 * ["call", "call", "event"], "wait"]


def test_the_clock_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(measured_costs, "by_events", lambda *args: calls.append(args) or [0.0])
    clock_of(torch.device("cuda"), 7, 10)(print)
    assert calls == [(print, 7, 10)]
    found = clock_of(torch.device("cpu"), 4, 3)(lambda: calls.append(()))
    assert len(found) == 4
    assert len(calls) == 1 + 1 + 4 * 3
