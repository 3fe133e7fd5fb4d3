"""In how many chunks to split a product with its communication, by measured links and multipliers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from statistics import median

import torch
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm import collectives as raw
from shardgrad.comm.agree import share_first
from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.comm.pieces import exact

_MOST = 8
_NEARLY = 0.04  # by how much more time than the best chunks take, fewer are preferred
_LEAST_GAIN = 0.05  # of a product and its communication, below which chunks are not worth the risk of a wrong model
_STEEPEST = 4.0  # how many times as large as its neighbour a chunk may be
_GRAIN = 16  # multipliers like rows and columns in such numbers
_KEY, _DECIDED = "overlap", "overlap decided"


@dataclass(frozen=True, slots=True)
class Chunking:
    """Into how many chunks, and how many thousandths of each chunk the next one has. Of whole numbers, so that ranks
    can exchange them."""

    count: int
    steepness: int = 1000

    def chunks(self, size: int) -> list[tuple[int, int]]:
        """Start and length of each chunk that is not empty, of so many rows or columns."""
        lengths = self.lengths(size)
        return list(zip(accumulate((0, *lengths)), lengths))

    @lru_cache(maxsize=1024)  # noqa: B019: of frozen values, a few for each program
    def lengths(self, size: int) -> tuple[int, ...]:
        """The lengths of the chunks that are not empty."""
        grain = _GRAIN if size >= 4 * _GRAIN * self.count else 1
        edges, so_far = [0], 0.0
        for share in self.shares[:-1]:
            so_far += share
            edges.append(min(size, round(so_far * size / grain) * grain))
        edges.append(size)
        return tuple([end - start for start, end in pairwise(edges) if end > start])

    @property
    def shares(self) -> list[float]:
        """The relative sizes of the chunks, whose sum is 1."""
        sizes = [(self.steepness / 1000) ** at for at in range(self.count)]
        return [size / sum(sizes) for size in sizes]


WHOLE = Chunking(0)


@dataclass(frozen=True)
class Link:
    """What collectives over one mesh axis cost beside a product.

    latency: seconds of the smallest all-reduce. seconds_per_byte: of a large one, for each byte that a rank sends.
    hidden: the share of the shorter of communication and product that vanishes when they run side by side.
    each: seconds that every collective, however small, takes from a product that it runs beside.
    """

    latency: float
    seconds_per_byte: float
    hidden: float
    each: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Of a machine: links by mesh axis; by dtype, seconds for each multiplication and addition of a product, and for
    each byte of an operand that a product in chunks reads once more."""

    links: Mapping[str, Link]
    seconds_per_flop: Mapping[torch.dtype, float] = field(default_factory=dict)
    seconds_per_byte_again: Mapping[torch.dtype, float] = field(default_factory=dict)

    def chunks(
        self,
        axis: str,
        sent: int,
        flops: int,
        reread_bytes: int,
        dtype: torch.dtype,
        local_fraction: float | None,
        following_flops: int = 0,
    ) -> Chunking:
        """The chunks for which communication and product together should take about the least time; none if that gains
        too little.

        sent: bytes that a rank sends. flops: multiplications and additions of the whole product. reread_bytes: bytes
        that each chunk beyond the first reads once more. local_fraction: for a gather, the share of the product that
        can be computed before anything has come; None for a reduction. following_flops: multiplications and additions
        of products that follow before a reduction is waited for.
        """
        link, rate = self.links.get(axis), self.seconds_per_flop.get(dtype)
        if link is None or rate is None:
            return WHOLE
        comm, compute = sent * link.seconds_per_byte, flops * rate
        more = reread_bytes * self.seconds_per_byte_again.get(dtype, 0.0)
        tail = following_flops * rate
        whole = (
            link.latency + comm + compute
            if local_fraction is not None
            else _taken((1.0,), link, comm, compute, 0.0, None, tail)
        )
        taken = {
            choice: _taken(choice.shares, link, comm, compute, more, local_fraction, tail)
            for choice in _choices(comm, compute, local_fraction)
        }
        least = min(taken.values())
        if least > whole * (1 - _LEAST_GAIN):
            return WHOLE
        # The fewest that are nearly as good: ranks that are not in step lose time at each of them.
        return min(
            (one for one in taken if taken[one] <= least * (1 + _NEARLY)), key=lambda one: (one.count, taken[one])
        )


def _choices(comm: float, compute: float, local_fraction: float | None) -> Iterator[Chunking]:
    """Equal chunks; and such that each is communicated in the time of its neighbour's product, so that little is left
    at the end."""
    before, after = (comm, compute) if local_fraction is None else (compute * (1 - local_fraction), comm)
    steepness = min(max(before / after, 1 / _STEEPEST), _STEEPEST) if after > 0 else 1.0
    for count in range(2 if local_fraction is None or local_fraction == 0 else 1, _MOST + 1):
        for thousandths in dict.fromkeys((1000, round(1000 * steepness))):
            yield Chunking(count, thousandths)


def _taken(
    shares: Sequence[float],
    link: Link,
    comm: float,
    compute: float,
    more: float,
    local_fraction: float | None,
    tail: float = 0.0,
) -> float:
    """Seconds until the last chunk is there, if products follow one another, and so do collectives."""
    sent = 0.0
    if local_fraction is None:
        made = -more
        for share in shares:
            made += compute * share + more + link.each
            sent = max(sent, made) + link.latency + comm * share
        end, spent = max(sent, made + tail), made + tail + link.latency * len(shares) + comm
    else:
        made = compute * local_fraction - (0.0 if local_fraction else more)
        for share in shares:
            sent += link.latency + comm * share
            made = max(made, sent) + compute * (1 - local_fraction) * share + more + link.each
        end, spent = made, compute + more * (len(shares) - (not local_fraction)) + link.each * len(shares) + sent
    return end + (1 - link.hidden) * (spent - end)


@dataclass(frozen=True)
class Always:
    """A number of equal chunks that is given, wherever a product can be split."""

    count: int

    def chunks(
        self,
        axis: str,
        sent: int,
        flops: int,
        reread_bytes: int,
        dtype: torch.dtype,
        local_fraction: float | None,
        following_flops: int = 0,
    ) -> Chunking:
        return Chunking(self.count) if self.count > 1 or local_fraction else WHOLE


@told
def set_overlap(mesh: DeviceMesh, how: Costs | int | None) -> None:
    """From now on, products on this mesh hide communication behind themselves, in chunks. Call it alike on all ranks.

    how: what `measure_costs` returned: each product is split where that gains, and into as many chunks as gain most. A
        number: always so many chunks. None: never (as at first).

    What is hidden: the reduction of Y behind Y's own product (row parallel), the gather of X or dY behind the product
    that reads it (sequence parallel), the gather of W and the reduction of dW likewise (fully sharded). A reduction of
    dX runs behind the product of dW with or without this. Rows or columns are split, sums are not; but a multiplier may
    round a smaller matrix differently, so bits may change with `how`: it is never decided behind your back.
    """
    mesh_view = view(mesh)
    mesh_view.settings.pop(_DECIDED, None)
    if how is not None and exact(mesh_view) is not None:
        raise ValueError(
            "sg.set_exact is set on this mesh, and overlap splits products into chunks, which may be rounded "
            "otherwise. Take it back first, with sg.set_exact(mesh, None)"
        )
    if how is None:
        mesh_view.settings.pop(_KEY, None)
    else:
        if isinstance(how, int):
            if how < 1:
                raise ValueError(f"a product is split into at least 1 chunk, not {how}")
            how = Always(how)  # type: ignore[assignment]
        mesh_view.settings[_KEY] = how
    for bound in mesh_view.bound.values():
        bound.forget_executables()


def is_set(mesh_view: MeshView) -> bool:
    """Whether overlap was set on a mesh."""
    return _KEY in mesh_view.settings


def choose(
    mesh_view: MeshView,
    axis: str,
    sent: int,
    flops: int,
    reread_bytes: int,
    dtype: torch.dtype,
    local_fraction: float | None,
    following_flops: int,
) -> Chunking:
    """`Costs.chunks`, by what `set_overlap` was given for a mesh."""
    how = mesh_view.settings.get(_KEY)
    return WHOLE if how is None else how.chunks(axis, sent, flops, reread_bytes, dtype, local_fraction, following_flops)


def choose_together(mesh_view: MeshView, axis: Axis, what: str, choose: Callable[[], Chunking]) -> Chunking:
    """What the first rank of an axis would choose, where ranks that have different shapes might differ.

    Decided when `what`, which all ranks of the axis have alike, is first to be done; remembered from then on.
    """
    how = mesh_view.settings.get(_KEY)
    if how is None or isinstance(how, Always):
        return choose()
    decided = mesh_view.settings.setdefault(_DECIDED, {})
    if (axis.name, what) not in decided:
        mine = choose()
        value = share_first(axis, what, mine.count * 10**6 + mine.steepness, "chunks of a product")
        decided[axis.name, what] = Chunking(*divmod(value, 10**6))
    return decided[axis.name, what]


@told
def measure_costs(
    mesh: DeviceMesh, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16), repeats: int = 9
) -> Costs:
    """Measure the links of every axis and the products of each dtype: some tenths of a second, more over slow links.
    The same on all ranks.

    Each time is a median of `repeats`, and the slowest rank's; so every rank decides alike. Keep what is returned if a
    run is to be repeated to the bit: it is data, and `set_overlap(mesh, costs)` decides by it alone.
    """
    mesh_view = view(mesh)
    device = mesh_view.device
    rates, reread, links = {}, {}, {}
    rows, size, chunks = 256, 1024, 8
    for dtype in dtypes:
        a, b = (torch.randn(count, size, device=device).to(dtype) for count in (rows, size))
        parts = a.chunk(chunks)
        whole = _slowest(_seconds(lambda a=a, b=b: torch.mm(a, b), repeats, device), mesh_view)  # type: ignore[misc]
        chunked = _slowest(
            _seconds(lambda parts=parts, b=b: [torch.mm(part, b) for part in parts], repeats, device),  # type: ignore[misc]
            mesh_view,
        )
        rates[dtype] = whole / (2 * rows * size**2)
        reread[dtype] = max(0.0, chunked - whole) / ((chunks - 1) * b.numel() * b.element_size())
    for name, axis in mesh_view.axes.items():
        if axis.size > 1:
            links[name] = _link(axis, mesh_view, repeats)
    return Costs(links, rates, reread)


def _link(axis: Axis, mesh_view: MeshView, repeats: int) -> Link:
    device = mesh_view.device
    small, large = torch.zeros(1, device=device), torch.zeros(2**19, device=device)  # 4 bytes and 2 MiB
    reduce = raw.AllReduce(axis, "measuring a link")

    def comm(x: torch.Tensor) -> None:
        reduce.wait(reduce.start(x))

    latency = _slowest(_seconds(lambda: comm(small), 2 * repeats, device), mesh_view)
    alone = _slowest(_seconds(lambda: comm(large), repeats, device), mesh_view)
    sent = 2 * (axis.size - 1) / axis.size * large.numel() * large.element_size()
    rate = max(alone - latency, 0.0) / sent
    a = torch.randn(384, 384, device=device)
    once = _slowest(_seconds(lambda: torch.mm(a, a), repeats, device), mesh_view)
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

    smalls = [torch.zeros(1, device=device) for _ in range(_MOST)]
    product = _slowest(_seconds(compute, repeats, device), mesh_view)
    together = _slowest(_seconds(both, repeats, device), mesh_view)
    each = (_slowest(_seconds(disturbed, repeats, device), mesh_view) - product) / len(smalls)
    hidden = (alone + product - together) / min(alone, product)
    return Link(latency, rate, min(max(hidden, 0.0), 1.0), max(each, 0.0))


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
