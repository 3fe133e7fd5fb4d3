"""What exact mode costs: products and a training step in pieces, beside the same ones as they are otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.bench.model import Shape
from shardgrad.bench.timing import Spread, in_turns, ratio, slowest_rank
from shardgrad.comm.mesh import view
from shardgrad.comm.shm.register import register
from shardgrad.ops.in_pieces import Piecewise
from shardgrad.train.decoder import Decoder
from shardgrad.train.llama import Llama
from shardgrad.train.model import GPT

PRODUCTS = {
    "column": "X[n,d] W[m/p,d] -> Y[n,m/p]",
    "row": "X[n,m/p] W[d,m/p] -> Y[n,d]",
    "data": "X[n/p,d] W[m,d] -> Y[n/p,m]",
}
STEP = "training step"
MODELS: dict[str, Callable[..., Decoder]] = {"llama": Llama, "gpt": GPT}
Size = tuple[int, int, int]
_CLOCKS = (time.perf_counter, time.thread_time)


@dataclass(frozen=True, slots=True)
class Row:
    """One part at V pieces on p ranks, in exact mode and without it.

    part, dtype, size: a product of `PRODUCTS` at [n, d, m], or `STEP` at [sequences, their length, d].
    pieces, ranks: V and p. sends: whether p ranks took part; if not, one rank did the local work of one of p, of their
    local sizes in V/p pieces, and sent nothing.
    ordinary, exact: milliseconds of the slowest rank. time, cpu: how many times as long exact mode takes, of elapsed
    and of the first thread's processor time.
    bytes: that a rank sends in forward and backward, without and in exact mode; clip: the same of clipping.
    most: partial sums that a product held at once.
    """

    part: str
    dtype: str
    size: Size
    pieces: int
    ranks: int
    sends: bool
    ordinary: Spread
    exact: Spread
    time: Spread
    cpu: Spread
    bytes: tuple[int, int]
    clip: tuple[int, int]
    most: int

    @property
    def each(self) -> int:
        """Pieces of a rank."""
        return self.pieces // self.ranks


@dataclass(frozen=True, slots=True)
class _Case:
    """What is timed: nothing on ranks that have no part."""

    forward_backward: Callable[[], object]
    rest: Callable[[], object] = lambda: None
    mesh: DeviceMesh | None = None
    sent: list[int] = field(default_factory=list)

    def __call__(self) -> None:
        self.forward_backward()
        self.rest()

    def traced(self) -> list[int]:
        """Bytes that this rank sends in each of the two, and the most sums held."""
        found = []
        for part in (self.forward_backward, self.rest):
            with sg.trace_collectives() as trace:
                part()
            found.append(trace.bytes)
        return [*found, 1 if self.mesh is None else most_held(self.mesh)]


def most_held(mesh: DeviceMesh) -> int:
    """The most partial sums that any product on a mesh has held at once."""
    functions = [one for bound in view(mesh).bound.values() for made in bound.built for one in made.functions]
    meant = [value for function in functions for value in function.__globals__.values()]
    return max((one.most for one in meant if isinstance(one, Piecewise)), default=1)


class _Meshes:
    """One axis of p ranks, on which exact mode is set or not. Made alike on all ranks."""

    def __init__(self, backend: str) -> None:
        self.world, self.rank, self._backend = dist.get_world_size(), dist.get_rank(), backend
        self._groups: dict[int, Any] = {}

    def of(self, ranks: int, pieces: int | None) -> DeviceMesh | None:
        """pieces: None: exact mode is not set. None on a rank that is none of the first `ranks`."""
        if ranks not in self._groups:
            self._groups[ranks] = dist.new_group(range(ranks), backend=self._backend if ranks > 1 else "gloo")
        if self.rank >= ranks:
            return None
        mesh = DeviceMesh.from_group(self._groups[ranks], "cpu", mesh_dim_names=("p",))
        if pieces is not None:
            sg.set_exact(mesh, pieces)
        return mesh


def cases(pieces: Sequence[int], world: int, *, alone: bool) -> Iterator[tuple[int, list[int]]]:
    """Each number of ranks p, and the numbers of pieces that it divides. alone: also more ranks than there are."""
    for ranks in range(1, max(pieces) + 1):
        of = [count for count in pieces if count % ranks == 0]
        if of and (ranks <= world or alone):
            yield ranks, of


def measure(
    sizes: Sequence[Size],
    dtypes: Sequence[torch.dtype],
    pieces: Sequence[int],
    rounds: int,
    *,
    backend: str = "shm",
    model: str | None = "llama",
    shape: Shape | None = None,
    turn: float = 0.02,
) -> list[Row]:
    """Measure on the ranks of the default group, which is gloo's. Every rank must call it alike.

    sizes, dtypes: of the products. model, shape: of the training step; None: there is none.
    """
    register()
    meshes, rows = _Meshes(backend), []
    for dtype in dtypes:
        for size in sizes:
            rows += _rows(_products(size, dtype, pieces, meshes), dtype, size, rounds, turn)
    if model is not None:
        s = shape or Shape(batch=4, seq_len=64)
        size = s.batch, s.seq_len, s.d_model
        rows += _rows(_steps(model, s, pieces, meshes), s.dtype, size, rounds, 5 * turn)
    return rows


Key = tuple[str, int, int | None, bool]
"""The part, ranks, pieces (None: ordinary), and whether it sends."""
_WARM = 0  # in place of pieces: a turn that is not looked at


def _products(size: Size, dtype: torch.dtype, pieces: Sequence[int], meshes: _Meshes) -> dict[Key, _Case]:
    found: dict[Key, _Case] = {}
    for part, text in PRODUCTS.items():
        for ranks, of in cases(pieces, meshes.world, alone=True):
            sends = ranks <= meshes.world
            for count in (None, *of):
                here = count if sends or count is None else count // ranks
                mesh = meshes.of(ranks if sends else 1, here)
                _add(found, (part, ranks, count, sends), _product(text, size, dtype, ranks, mesh))
    return found


def _add(found: dict[Key, _Case], key: Key, case: _Case) -> None:
    """One more case. Before an ordinary one it is run once more: other ranks took part in the turn before that."""
    part, ranks, pieces, sends = key
    if pieces is None:
        found[part, ranks, _WARM, sends] = case
    found[key] = case


def _product(text: str, size: Size, dtype: torch.dtype, ranks: int, mesh: DeviceMesh | None) -> _Case:
    """Forward and backward of one product, of the local sizes of so many ranks; 16-bit sums are taken in float32."""
    if mesh is None:
        return _IDLE
    layout, whole = sg.Layout(text), dict(zip("ndm", size))
    local = [[whole[dim.letter] // (ranks if dim.axes else 1) for dim in tensor.dims] for tensor in layout.tensors[:3]]
    x, w, dy = (torch.randn(*shape).to(dtype) for shape in local)
    x.requires_grad_()
    w.requires_grad_()
    reduce_dtype = torch.float32 if dtype.itemsize == 2 else None

    def step() -> None:
        x.grad = w.grad = None
        sg.matmul(x, w, layout, mesh, reduce_dtype=reduce_dtype).backward(dy)

    return _Case(step, mesh=mesh)


def _steps(model: str, shape: Shape, pieces: Sequence[int], meshes: _Meshes) -> dict[Key, _Case]:
    found: dict[Key, _Case] = {}
    for ranks, of in cases(pieces, meshes.world, alone=False):
        for count in (None, *of):
            _add(found, (STEP, ranks, count, True), _step(model, shape, meshes.of(ranks, count)))
    return found


def _step(model: str, s: Shape, mesh: DeviceMesh | None) -> _Case:
    """Forward, loss, backward; clipping and AdamW: tensor and sequence parallel, on random tokens."""
    if mesh is None:
        return _IDLE
    torch.manual_seed(0)
    made = MODELS[model](
        layers=s.layers, heads=s.heads, d_model=s.d_model, seq_len=s.seq_len, vocab=s.vocab, mesh=mesh, axis="p",
        dtype=s.dtype,
    )  # fmt: skip
    ids, targets = torch.randint(s.vocab, (2, s.batch, s.seq_len)).unbind()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)

    def forward_backward() -> None:
        optimizer.zero_grad()
        made.loss(ids, targets).backward()

    def rest() -> None:
        sg.clip_grad_norm_(made, 1.0)
        optimizer.step()

    return _Case(forward_backward, rest, mesh)


_IDLE = _Case(lambda: None)


def _rows(made: dict[Key, _Case], dtype: torch.dtype, size: Size, rounds: int, turn: float) -> list[Row]:
    times = in_turns(made, rounds, turn=turn, meet=dist.barrier, slowest=slowest_rank, clocks=_CLOCKS)
    counted = {}
    for key, case in made.items():
        bytes_, clip, most = slowest_rank([float(number) for number in case.traced()])
        counted[key] = int(bytes_), int(clip), int(most)
    rows = []
    for key, (wall, cpu) in times.items():
        part, ranks, pieces, sends = key
        if not pieces:
            continue
        base = part, ranks, None, sends
        rows.append(
            Row(
                part,
                str(dtype).removeprefix("torch."),
                size,
                pieces,
                ranks,
                sends,
                Spread.of(times[base][0]).scaled(1e3),
                Spread.of(wall).scaled(1e3),
                ratio(wall, times[base][0]),
                ratio(cpu, times[base][1]),
                (counted[base][0], counted[key][0]),
                (counted[base][1], counted[key][1]),
                counted[key][2],
            )
        )
    return rows


def broken(rows: Sequence[Row]) -> list[str]:
    """What exact mode promises and does not hold, in words: where a rank's pieces are a power of two, it sends the
    bytes of an ordinary step (but for clipping, which gathers some numbers of each piece), and holds at most
    log2(V/p) + 1 partial sums."""
    found = []
    for row in rows:
        if row.each & (row.each - 1):
            continue
        where = f"{row.part}, {row.dtype} {list(row.size)}, {row.pieces} pieces on p = {row.ranks}"
        ordinary, exact = row.bytes
        if exact != ordinary:
            found.append(f"{where}: exact mode sends {exact:,} bytes, an ordinary step {ordinary:,}")
        if row.most > row.each.bit_length():
            found.append(f"{where}: {row.most} partial sums are held at once, more than {row.each.bit_length()}")
    return found


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]


def draw(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """How many times as long exact mode takes, with its interval, by V and p; a panel each for products and steps.

    note: of the machine.
    """
    from shardgrad import charts  # matplotlib takes its time

    parts = [some for some in ([r for r in rows if r.part != STEP], [r for r in rows if r.part == STEP]) if some]
    with charts.chart(path, "Exact mode's time, over the ordinary", (9, 0.8 + 3.2 * len(parts)), note) as figure:
        for panel, these in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts):
            places = list(dict.fromkeys((row.pieces, row.ranks) for row in these))
            series = list(dict.fromkeys((row.part, row.dtype, row.size) for row in these))
            for at, (part, dtype, size) in enumerate(series):
                mine = [row for row in these if (row.part, row.dtype, row.size) == (part, dtype, size)]
                points = [places.index((row.pieces, row.ranks)) + 0.05 * (at - len(series) / 2) for row in mine]
                label = f"{part}, {dtype}, {' × '.join(map(str, size))}"
                charts.spreads(panel, points, [row.time for row in mine], at, label, line=False)
            charts.line_at(panel, 1)
            charts.plain(panel, "y", "products" if these[0].part != STEP else STEP)
            charts.ratios(panel, [end for row in these for end in (row.time.low, row.time.high)])
            panel.set_xticks(range(len(places)), [f"V = {pieces}\np = {ranks}" for pieces, ranks in places])
            panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7.5)
