"""How much communication hides behind products: each alone, both in one call, with and without chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.bench import peers
from shardgrad.bench.timing import Spread, in_turns, slowest_rank
from shardgrad.comm import collectives as raw
from shardgrad.comm.mesh import Axis, view
from shardgrad.comm.shm.register import register
from shardgrad.comm.timer import comm_timer
from shardgrad.ops.overlap import Costs

Size = tuple[int, int, int]
Call = Callable[[], object]
WHOLE, CHUNKED = "shardgrad", "shardgrad, sg.set_overlap"
CASES = (
    "column, backward",
    "row, forward",
    "column + sequence, forward",
    "row + sequence, forward",
    "row + sequence, backward",
    "fully sharded, forward",
    "fully sharded, backward",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One case, done by one contender, at one size [tokens, d, hidden] and dtype. Times in microseconds.

    products, communication: each alone. could: the product behind which the communication could run; what could be
    hidden is the shorter of it and the communication. together: the call that does both. hidden: the share of what
    could be hidden that was: (products + communication - together) / min(could, communication). What the
    call does besides both lessens it. unwaited: the same share by another clock, (communication - the time that the
    call spent starting collectives and blocked on them) / min(could, communication), which other load disturbs less; of
    shardgrad's own calls.
    """

    case: str
    dtype: str
    size: Size
    name: str
    products: Spread
    communication: Spread
    could: Spread
    together: Spread
    hidden: Spread
    unwaited: Spread | None


@dataclass(frozen=True, slots=True)
class _Case:
    """products: all of them; could: those that the communication can run behind, if not all; together: each
    contender's call of both."""

    products: Call
    communication: Call
    together: dict[str, Call]
    could: Call | None = None


def measure(
    sizes: Sequence[Size], dtypes: Sequence[torch.dtype], rounds: int, backend: str = "gloo", turn: float = 0.05
) -> tuple[list[Row], Costs]:
    """Measure on the ranks of the default group. Returns the rows, and what links and multipliers were measured to do.

    tokens must be a multiple of the ranks, and so must the hidden features.
    """
    register()
    peers.warnings_off()
    group = dist.new_group(range(dist.get_world_size()), backend=backend)
    # Two meshes on one group: what `sg.set_overlap` decides is decided for a mesh.
    whole, chunked = (DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",)) for _ in range(2))
    costs = sg.measure_costs(chunked, tuple(dtypes))
    sg.set_overlap(chunked, costs)
    rows = []
    for dtype in dtypes:
        for size in sizes:
            for name, case in _cases(size, dtype, {WHOLE: whole, CHUNKED: chunked}):
                rows += _rows(name, str(dtype).removeprefix("torch."), size, case, rounds, turn)
    peers.forget_groups()
    return rows, costs


def _rows(name: str, dtype: str, size: Size, case: _Case, rounds: int, turn: float) -> list[Row]:
    alone = {"products": case.products, "communication": case.communication}
    if case.could is not None:
        alone["could"] = case.could
    calls = alone | {f"together {contender}": call for contender, call in case.together.items()}
    found = in_turns(calls, rounds, turn=turn, meet=dist.barrier, slowest=slowest_rank)
    times = {key: values[0] for key, values in found.items()}
    products, comm = times["products"], times["communication"]
    could = times.get("could", products)
    behind = [min(c, t) for c, t in zip(could, comm)]
    rows = []
    for contender, call in case.together.items():
        both = times[f"together {contender}"]
        hidden = Spread.of([(p + t - b) / m for p, t, b, m in zip(products, comm, both, behind)])
        unwaited = None
        if contender in (WHOLE, CHUNKED):
            unwaited = Spread.of([(t - w) / m for t, w, m in zip(comm, _waited(call, rounds), behind)])
        micro = _micro(products), _micro(comm), _micro(could), _micro(both)
        rows.append(Row(name, dtype, size, contender, *micro, hidden, unwaited))
    return rows


def _micro(seconds: list[float]) -> Spread:
    return Spread.of(seconds).scaled(1e6)


def _waited(call: Call, rounds: int) -> list[float]:
    """Seconds of each of some calls that the slowest rank spent starting collectives and blocked on them."""
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        with comm_timer() as clock:
            call()
        seconds.append(clock.seconds)
    return slowest_rank(seconds)


def _cases(size: Size, dtype: torch.dtype, meshes: dict[str, DeviceMesh]) -> Iterator[tuple[str, _Case]]:
    tokens, d, m = size
    axis = next(iter(view(meshes[WHOLE]).axes.values()))
    part, own = m // axis.size, tokens // axis.size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype) / shape[-1] ** 0.5

    x, x_own, h, dy = random(tokens, d), random(own, d), random(tokens, part), random(tokens, d)
    up, down, dh, y_own = random(part, d), random(d, part), random(tokens, part), random(own, d)
    others = [name for name in ("DTensor", "fairscale", "Megatron-core") if peers.missing(name) is None]
    blocks = {name: peers.PEERS[name].make(d, m, dtype, meshes[WHOLE]) for name in others}

    def columns(**options: Any) -> dict[str, nn.Module]:
        return {
            contender: sg.ColumnParallelLinear(d, m, bias=False, mesh=mesh, dtype=dtype, **options)
            for contender, mesh in meshes.items()
        }

    def rows(**options: Any) -> dict[str, nn.Module]:
        return {
            contender: sg.RowParallelLinear(m, d, bias=False, mesh=mesh, dtype=dtype, **options)
            for contender, mesh in meshes.items()
        }

    yield (
        CASES[0],
        _Case(
            lambda: (dh.mm(up), dh.t().mm(x)),
            _reducing(x, axis),
            {contender: _backward(one, x, dh) for contender, one in {**columns(), **_halves(blocks, "up")}.items()},
            lambda: dh.t().mm(x),
        ),
    )
    yield (
        CASES[1],
        _Case(
            lambda: F.linear(h, down),
            _reducing(dy, axis),
            {contender: _forward(one, h) for contender, one in {**rows(), **_halves(blocks, "down")}.items()},
        ),
    )
    yield (
        CASES[2],
        _Case(
            lambda: F.linear(x, up),
            lambda: raw.AllGather(axis, 0, tokens)(x_own),
            {contender: _forward(one, x_own, tokens) for contender, one in columns(sequence_dim=0).items()},
        ),
    )
    yield (
        CASES[3],
        _Case(
            lambda: F.linear(h, down),
            lambda: raw.ReduceScatter(axis, 0)(dy),
            {contender: _forward(one, h) for contender, one in rows(sequence_dim=0).items()},
        ),
    )
    yield (
        CASES[4],
        _Case(
            lambda: (dy.mm(down), dy.t().mm(h)),
            lambda: raw.AllGather(axis, 0, tokens)(y_own),
            {contender: _backward(one, h, y_own) for contender, one in rows(sequence_dim=0).items()},
        ),
    )
    # A weight of one rank's size of the above, stored in shards: gathered for Y and again for dX, dW reduce-scattered.
    stored = up.chunk(axis.size, 1)[0].contiguous()
    sharded = {
        contender: sg.Linear(d, part, bias=False, layout="X[n/tp,d] W[m,d/tp] -> Y[n/tp,m]", mesh=mesh, dtype=dtype)
        for contender, mesh in meshes.items()
    }
    dh_own = dh[:own].contiguous()
    yield (
        CASES[5],
        _Case(
            lambda: F.linear(x_own, up),
            lambda: raw.AllGather(axis, 1, d)(stored),
            {contender: _forward(one, x_own) for contender, one in sharded.items()},
        ),
    )
    yield (
        CASES[6],
        _Case(
            lambda: (dh_own.mm(up), dh_own.t().mm(x_own)),
            lambda: (raw.AllGather(axis, 1, d)(stored), raw.ReduceScatter(axis, 1)(up)),
            {contender: _backward(one, x_own, dh_own) for contender, one in sharded.items()},
        ),
    )


def _halves(blocks: dict[str, nn.Module], half: str) -> dict[str, nn.Module]:
    return {name: getattr(block, half) for name, block in blocks.items()}


def _reducing(like: Tensor, axis: Axis) -> Call:
    """An all-reduce, of zeros, which stay zeros however often they are summed."""
    summed = torch.zeros_like(like)
    return lambda: raw.AllReduce(axis)(summed)


def _forward(layer: nn.Module, x: Tensor, *more: int) -> Call:
    leaf = x.detach().requires_grad_()
    return lambda: peers.arrive(layer(leaf, *more))


def _backward(layer: nn.Module, x: Tensor, dy: Tensor) -> Call:
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    wanted = [leaf, *layer.parameters()]
    return lambda: peers.arrive(*torch.autograd.grad(y, wanted, dy, retain_graph=True))


def as_json(rows: Sequence[Row], costs: Costs) -> dict[str, object]:
    rates = {str(dtype).removeprefix("torch."): 1 / seconds for dtype, seconds in costs.seconds_per_flop.items()}
    links = {axis: asdict(link) for axis, link in costs.links.items()}
    return {"unit": "µs", "links": links, "FLOP/s": rates, "rows": [asdict(row) for row in rows]}


def draw(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """The share of what could be hidden that was, a panel for each size and dtype; note: of the machine."""
    from matplotlib.ticker import PercentFormatter

    from shardgrad import charts  # matplotlib takes its time

    panels = list(dict.fromkeys((row.dtype, row.size) for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    title = "Communication hidden behind products, of what could be"
    with charts.chart(path, title, (10.5, 1.2 + 2.6 * len(panels)), note) as figure:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, (dtype, size) in zip(axes, panels):
            for at, name in enumerate(names):
                these = [row for row in rows if (row.dtype, row.size, row.name) == (dtype, size, name)]
                places = [CASES.index(row.case) + 0.12 * (at - (len(names) - 1) / 2) for row in these]
                charts.spreads(panel, places, [row.hidden for row in these], at, name, line=False)
            charts.line_at(panel, 0)
            charts.plain(panel, "y", f"{dtype}, {' × '.join(map(str, size))}")
            panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[-1].set_xticks(range(len(CASES)), [case.replace(", ", ",\n").replace(" + ", " +\n") for case in CASES])
        charts.legend_of(figure, axes[0])
