"""What the links and the multipliers of a machine cost, measured: what `set_overlap` decides by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm import collectives as raw
from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.ops.overlap import MOST_CHUNKS, Costs, Link


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What is measured: a product [rows, size] · [size, size], whole and in chunks; square products beside an
    all-reduce of so many float32. calls: how many follow one another without a look at the clock."""

    rows: int
    size: int
    square: int
    elements: int
    calls: int


# Large enough that the launch of a kernel, some µs, does not count; and launches are not waited for one by one.
_SIZES = {"cpu": _Sizes(256, 1024, 384, 2**19, 1), "cuda": _Sizes(4096, 4096, 2048, 2**24, 10)}
_CHUNKS = 8

Clock = Callable[[Callable[[], object]], list[float]]
"""Seconds of one call, several times."""


@told
def measure_costs(
    mesh: DeviceMesh, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16), repeats: int = 9
) -> Costs:
    """Measure the links of every axis and the products of each dtype: some tenths of a second, more over slow links.
    The same on all ranks.

    Each time is a median of `repeats`, and the slowest rank's; so every rank decides alike. Keep what is returned if a
    run is to be repeated to the bit: it is data, and `set_overlap(mesh, costs)` decides by it alone.

    On CUDA times are the device's own, between events, of ten calls in a row and of large products and messages.
    """
    mesh_view = view(mesh)
    sizes = _SIZES.get(mesh_view.device.type, _SIZES["cpu"])
    clock = clock_of(mesh_view.device, repeats, sizes.calls)
    rates, reread = {}, {}
    for dtype in dtypes:
        rates[dtype], reread[dtype] = _products(mesh_view, dtype, sizes, clock)
    links = {name: _link(axis, mesh_view, sizes, clock) for name, axis in mesh_view.axes.items() if axis.size > 1}
    return Costs(links, rates, reread)


def _products(mesh_view: MeshView, dtype: torch.dtype, sizes: _Sizes, clock: Clock) -> tuple[float, float]:
    """Seconds for each multiplication and addition, and for each byte of an operand that a chunk reads once more."""
    rows, size = sizes.rows, sizes.size
    a, b = (torch.randn(count, size, device=mesh_view.device).to(dtype) for count in (rows, size))
    parts = a.chunk(_CHUNKS)
    whole = _slowest(clock(lambda: torch.mm(a, b)), mesh_view)
    chunked = _slowest(clock(lambda: [torch.mm(part, b) for part in parts]), mesh_view)
    again = max(0.0, chunked - whole) / ((len(parts) - 1) * b.numel() * b.element_size())
    return whole / (2 * rows * size**2), again


def _link(axis: Axis, mesh_view: MeshView, sizes: _Sizes, clock: Clock) -> Link:
    device = mesh_view.device
    small, large = torch.zeros(1, device=device), torch.zeros(sizes.elements, device=device)
    reduce = raw.AllReduce(axis, "measuring a link")

    def comm(x: torch.Tensor) -> None:
        reduce.wait(reduce.start(x))

    latency = _slowest(clock(lambda: comm(small)) + clock(lambda: comm(small)), mesh_view)
    alone = _slowest(clock(lambda: comm(large)), mesh_view)
    sent = 2 * (axis.size - 1) / axis.size * large.numel() * large.element_size()
    rate = max(alone - latency, 0.0) / sent
    a = torch.randn(sizes.square, sizes.square, device=device)
    once = _slowest(clock(lambda: torch.mm(a, a)), mesh_view)
    times = max(1, round(alone / once))

    def compute() -> None:
        for _ in range(times):
            torch.mm(a, a)

    def both() -> None:
        started = reduce.start(large)
        compute()
        reduce.wait(started)

    def disturbed() -> None:
        started = [reduce.start(small) for small in smalls]
        compute()
        for one in started:
            reduce.wait(one)

    smalls = [torch.zeros(1, device=device) for _ in range(MOST_CHUNKS)]
    product = _slowest(clock(compute), mesh_view)
    together = _slowest(clock(both), mesh_view)
    each = (_slowest(clock(disturbed), mesh_view) - product) / len(smalls)
    hidden = (alone + product - together) / min(alone, product)
    return Link(latency, rate, min(max(hidden, 0.0), 1.0), max(each, 0.0))


def clock_of(device: torch.device, repeats: int, calls: int) -> Clock:
    """The clock of a device: the host's, or events in a CUDA stream."""
    if device.type == "cuda":
        return lambda call: by_events(call, repeats, calls)
    return lambda call: _by_host(call, repeats, calls)


def _by_host(call: Callable[[], object], repeats: int, calls: int) -> list[float]:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return times


def by_events(call: Callable[[], object], repeats: int, calls: int, cuda: Any = torch.cuda) -> list[float]:
    """The device's seconds of one call: all are launched, and only then waited for.

    cuda: torch.cuda, or what stands for it in a test.
    """
    call()
    events = [cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        for _ in range(calls):
            call()
        event.record()
    cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) / calls for start, end in pairwise(events)]


def _slowest(seconds: list[float], mesh_view: MeshView) -> float:
    """The largest of all ranks' medians, in whole nanoseconds."""
    nanoseconds = int(median(seconds) * 1e9)
    for axis in mesh_view.axes.values():
        if axis.size > 1:
            rows = raw.gather_ints([nanoseconds], axis, mesh_view.device, "measured times")
            nanoseconds = max(row[0] for row in rows)
    return nanoseconds / 1e9
