"""How a product hides its communication: in how many chunks, by what costs; or fused, over symmetric memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm import fused
from shardgrad.comm.agree import share_first
from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.comm.pieces import exact

MOST_CHUNKS = 8
_NEARLY = 0.04  # by how much more time than the best chunks take, fewer are preferred
_LEAST_GAIN = 0.05  # of a product and its communication, below which chunks are not worth the risk of a wrong model
_STEEPEST = 4.0  # how many times as large as its neighbour a chunk may be
_GRAIN = 16  # multipliers like rows and columns in such numbers
_KEY, _DECIDED, _NOTED = "overlap", "overlap decided", "overlap noted"


@dataclass(frozen=True, slots=True)
class Chunking:
    """Into how many chunks, and how many thousandths of each chunk the next one has. Of whole numbers, so that ranks
    can exchange them."""

    count: int
    steepness: int = 1000

    def __str__(self) -> str:
        return f"{self.count} chunk{'s' * (self.count != 1)}"

    def chunks(self, size: int) -> list[tuple[int, int]]:
        """Start and length of each chunk that is not empty, of so many rows or columns."""
        lengths = self.lengths(size)
        return list(zip(accumulate((0, *lengths)), lengths))

    def lengths(self, size: int) -> tuple[int, ...]:
        """The lengths of the chunks that are not empty."""
        return _lengths(self, size)

    @property
    def shares(self) -> list[float]:
        """The relative sizes of the chunks, whose sum is 1."""
        sizes = [(self.steepness / 1000) ** at for at in range(self.count)]
        return [size / sum(sizes) for size in sizes]


WHOLE = Chunking(0)


@lru_cache(maxsize=1024)  # asked for at every call
def _lengths(chunking: Chunking, size: int) -> tuple[int, ...]:
    grain = _GRAIN if size >= 4 * _GRAIN * chunking.count else 1
    edges, so_far = [0], 0.0
    for share in chunking.shares[:-1]:
        so_far += share
        edges.append(min(size, round(so_far * size / grain) * grain))
    edges.append(size)
    return tuple([end - start for start, end in pairwise(edges) if end > start])


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
    for count in range(2 if local_fraction is None or local_fraction == 0 else 1, MOST_CHUNKS + 1):
        for thousandths in dict.fromkeys((1000, round(1000 * steepness))):
            yield Chunking(count, thousandths)


def _taken(
    shares: Sequence[float],
    link: Link,
    comm: float,
    compute: float,
    more: float,
    local_fraction: float | None,
    tail: float,
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


@dataclass(frozen=True)
class SymmMem:
    """Fused products over symmetric memory wherever there is one. lacking: why not, by axis."""

    lacking: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class OverlapDecision:
    """What became of one collective of a product.

    product: its layout. phase: `forward`, `dX`, `dW`, with the layout's names. collective: such as "all-gather of X".
    how: "whole", "5 chunks" (besides the own shard's part) or "symm_mem". why: of what is whole, the reason.
    """

    product: str
    phase: str
    collective: str
    axis: str
    how: str
    why: str = ""

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return f"{self.product}, {self.phase}: {self.collective} over {self.axis}: {self.how}{why}"


@told
def set_overlap(mesh: DeviceMesh, how: Costs | int | Literal["symm_mem"] | None) -> None:
    """From now on, products on this mesh hide communication behind themselves. Call it alike on all ranks.

    how: what `measure_costs` returned: each product is split where that gains, and into as many chunks as gain most. A
        number: always so many chunks. "symm_mem": gathers of X or dY and reduce-scatters, along rows, go to torch's
        products over symmetric memory, which communicate as they multiply; nothing else is split. None: never (as at
        first).

    What is hidden: the reduction of Y behind Y's own product (row parallel), the gather of X or dY behind the product
    that reads it (sequence parallel), the gather of W and the reduction of dW likewise (fully sharded). A reduction of
    dX runs behind the product of dW with or without this. Rows or columns are split, sums are not; but a multiplier may
    round a smaller matrix differently, so bits may change with `how`: it is never decided behind your back.
    `overlap_decisions` says what became of each collective.

    Raises:
        ValueError: not such a `how`; exact mode is set; no axis of the mesh has symmetric memory, and why.
    """
    mesh_view = view(mesh)
    if how is not None and exact(mesh_view) is not None:
        raise ValueError(
            "sg.set_exact is set on this mesh, and overlap splits products into chunks, which may be rounded "
            "otherwise. Take it back first, with sg.set_exact(mesh, None)"
        )
    decided = None if how is None else _read(how, mesh_view)
    for key in (_KEY, _DECIDED, _NOTED):
        mesh_view.settings.pop(key, None)
    if decided is not None:
        mesh_view.settings[_KEY] = decided
    for bound in mesh_view.bound.values():
        bound.forget_executables()


def _read(how: Costs | int | str, mesh_view: MeshView) -> Costs | Always | SymmMem:
    if isinstance(how, str):
        if how != "symm_mem":
            raise ValueError(
                f'set_overlap takes what sg.measure_costs returns, a number, "symm_mem" or None, not {how!r}'
            )
        lacking = fused.lacking(mesh_view)
        if lacking and len(lacking) == sum(axis.size > 1 for axis in mesh_view.axes.values()):
            reasons = "; ".join(f"axis {name!r}: {why}" for name, why in lacking.items())
            raise ValueError(
                f'set_overlap(mesh, "symm_mem") would do nothing on this mesh ({reasons}): pass what '
                "sg.measure_costs(mesh) returns, or a number of chunks"
            )
        return SymmMem(lacking)
    if isinstance(how, int):
        if how < 1:
            raise ValueError(f"a product is split into at least 1 chunk, not {how}")
        return Always(how)
    return how


@told
def overlap_decisions(mesh: DeviceMesh) -> list[OverlapDecision]:
    """What became of each collective of the products that this rank has run on a mesh since `set_overlap`, in the order
    in which they were first prepared: what is hidden, how, and of what is whole, why."""
    return list(view(mesh).settings.get(_NOTED, {}))


def note(mesh_view: MeshView, decision: OverlapDecision) -> None:
    """Remember a decision, once."""
    mesh_view.settings.setdefault(_NOTED, {})[decision] = None


def is_set(mesh_view: MeshView) -> bool:
    """Whether overlap was set on a mesh."""
    return _KEY in mesh_view.settings


def symmetric(mesh_view: MeshView) -> SymmMem | None:
    """What was found of symmetric memory, where a mesh is to use it."""
    how = mesh_view.settings.get(_KEY)
    return how if isinstance(how, SymmMem) else None


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
