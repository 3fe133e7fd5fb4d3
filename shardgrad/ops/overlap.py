"""In how many pieces to cut a product with its communication: from what links and multipliers were measured to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm import collectives as raw
from shardgrad.comm.mesh import Axis, MeshView, view

_MOST = 8
_LEAST_GAIN = 0.03  # of a product and its communication, below which cutting is not worth its own cost
_KEY = "overlap"


@dataclass(frozen=True)
class Link:
    """What collectives over one mesh axis cost beside a product.

    latency: seconds of the smallest all-reduce. seconds_per_byte: of a large one, for each byte that a rank sends.
    hidden: the share of the shorter of communication and product that vanishes when they run side by side.
    """

    latency: float
    seconds_per_byte: float
    hidden: float


@dataclass(frozen=True)
class Costs:
    """Of a machine: links by mesh axis; seconds for each multiplication and addition of a product, by dtype."""

    links: Mapping[str, Link]
    seconds_per_flop: Mapping[torch.dtype, float] = field(default_factory=dict)

    def pieces(self, axis: str, sent: int, flops: int, dtype: torch.dtype, ranks: int, *, gather: bool) -> int:
        """The number of pieces for which communication and product together should take least; 1 if cutting gains
        nothing worth having; 0 for a gather if even the own shard's part should not be split off.

        sent: bytes that a rank sends. flops: multiplications and additions of the whole product.
        """
        link, rate = self.links.get(axis), self.seconds_per_flop.get(dtype)
        if link is None or rate is None:
            return 0 if gather else 1
        talk, work = link.latency + sent * link.seconds_per_byte, flops * rate
        best, least = (0 if gather else 1), (talk + work) * (1 - _LEAST_GAIN)
        for pieces in range(1 if gather else 2, _MOST + 1):
            talking = talk + (pieces - 1) * link.latency
            # What can run side by side: all but the first piece of one, and the last of the other.
            beside = work / ranks + (work - work / ranks) * (pieces - 1) / pieces if gather else work * (1 - 1 / pieces)
            alongside = talking if gather else talking * (1 - 1 / pieces)
            taken = talking + work - link.hidden * min(beside, alongside)
            if taken < least * (1 - 1e-9):
                best, least = pieces, taken
        return best


@dataclass(frozen=True)
class Always:
    """A number of pieces that is given, wherever a product can be cut."""

    count: int

    def pieces(self, axis: str, sent: int, flops: int, dtype: torch.dtype, ranks: int, *, gather: bool) -> int:
        return self.count


def overlap(mesh: DeviceMesh, how: Costs | int | None) -> None:
    """From now on, products on this mesh hide communication behind themselves, in pieces. Call it alike on all ranks.

    how: what `measure_costs` returned: each product is cut where that gains, and into as many pieces as gain most. A
        number: always so many pieces. None: never (as at first).

    What is hidden: the reduction of Y behind Y's own product (row parallel), the gather of X or dY behind the product
    that reads it (sequence parallel). A reduction of dX runs behind the product of dW with or without this. Rows are
    cut, sums are not; but a multiplier may round a smaller matrix differently, so bits may change with `how`, which is
    therefore never decided behind your back.
    """
    mesh_view = view(mesh)
    if how is None:
        mesh_view.compiled.pop(_KEY, None)
    else:
        if isinstance(how, int):
            if how < 1:
                raise ValueError(f"a product is cut into at least 1 piece, not {how}")
            how = Always(how)  # type: ignore[assignment]
        mesh_view.compiled[_KEY] = how
    for product in mesh_view.compiled.values():
        forget = getattr(product, "forget_programs", None)
        if forget is not None:
            forget()


def chosen(mesh_view: MeshView) -> Costs | Always:
    found = mesh_view.compiled.get(_KEY)
    return found if found is not None else _NEVER


class _Never(Always):
    def pieces(self, axis: str, sent: int, flops: int, dtype: torch.dtype, ranks: int, *, gather: bool) -> int:
        return 0 if gather else 1


_NEVER = _Never(1)


def measure_costs(
    mesh: DeviceMesh, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16), repeats: int = 5
) -> Costs:
    """Measure the links of every axis and the products of each dtype: some tenths of a second. The same on all ranks.

    Each time is a median of `repeats`, and the slowest rank's; so every rank decides alike. Keep what is returned if a
    run is to be repeated to the bit: it is data, and `overlap(mesh, costs)` decides by it alone.
    """
    mesh_view = view(mesh)
    device = mesh_view.device
    rates, links = {}, {}
    size = 512
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(dtype)
        rates[dtype] = _slowest(_seconds(lambda a=a: torch.mm(a, a), repeats, device), mesh_view) / (2 * size**3)  # type: ignore[misc]
    for name, axis in mesh_view.axes.items():
        if axis.size > 1:
            links[name] = _link(axis, mesh_view, repeats)
    return Costs(links, rates)


def _link(axis: Axis, mesh_view: MeshView, repeats: int) -> Link:
    device = mesh_view.device
    small, large = torch.zeros(1, device=device), torch.zeros(2**19, device=device)  # 4 bytes and 2 MiB
    reduce = raw.AllReduce(axis, "measuring a link")

    def talk(x: torch.Tensor) -> None:
        reduce.wait(reduce.start(x))

    latency = _slowest(_seconds(lambda: talk(small), 2 * repeats, device), mesh_view)
    alone = _slowest(_seconds(lambda: talk(large), repeats, device), mesh_view)
    sent = 2 * (axis.size - 1) / axis.size * large.numel() * large.element_size()
    rate = max(alone - latency, 0.0) / sent
    a = torch.randn(384, 384, device=device)
    once = _slowest(_seconds(lambda: torch.mm(a, a), repeats, device), mesh_view)
    times = max(1, round(alone / once))

    def work() -> None:
        for _ in range(times):
            torch.mm(a, a)

    def both() -> None:
        started = reduce.start(large)
        work()
        reduce.wait(started)

    product = _slowest(_seconds(work, repeats, device), mesh_view)
    together = _slowest(_seconds(both, repeats, device), mesh_view)
    hidden = (alone + product - together) / min(alone, product)
    return Link(latency, rate, min(max(hidden, 0.0), 1.0))


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return median(times)


def _slowest(seconds: float, mesh_view: MeshView) -> float:
    """The largest of all ranks' figures, in whole nanoseconds."""
    nanoseconds = int(seconds * 1e9)
    for axis in mesh_view.axes.values():
        if axis.size > 1:
            rows = raw.gather_ints([nanoseconds], axis, mesh_view.device, "measured times")
            nanoseconds = max(row[0] for row in rows)
    return nanoseconds / 1e9
