"""The product to a vocabulary and its loss in one, beside logits that exist at once: peak memory, and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from shardgrad.bench.timing import Spread, in_turns, ratio, slowest_rank
from shardgrad.comm import shim
from shardgrad.comm.mesh import view
from shardgrad.layout.layout import Layout
from shardgrad.layout.sizes import chunk
from shardgrad.nn.linear_loss import linear_cross_entropy
from shardgrad.nn.loss import vocab_parallel_cross_entropy
from shardgrad.ops.matmul import matmul

LAYOUT = Layout("X[n,d] W[v/tp,d] -> Z[n,v/tp]")
UNFUSED, AGAIN, NOW = "logits at once", "in chunks, computed again", "in chunks, gradients in forward"
HAND, TORCH = "in chunks, by hand", "torch's, in chunks"
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """x [n, d], alike on every rank, w [v/tp, d] and target [n]."""

    x: Tensor
    w: Tensor
    target: Tensor
    vocab: int
    mesh: DeviceMesh

    @staticmethod
    def of(size: Size, dtype: torch.dtype, mesh: DeviceMesh) -> Case:
        """size: tokens, features, words."""
        tokens, d, words = size
        axis, generator = view(mesh).axis("tp"), torch.Generator().manual_seed(0)
        x = torch.randn(tokens, d, generator=generator).to(dtype).requires_grad_()
        start, here = chunk(words, axis.size, axis.index)
        w = torch.randn(words, d, generator=generator)[start : start + here].mul(d**-0.5).to(dtype).requires_grad_()
        return Case(x, w, torch.randint(0, words, (tokens,), generator=generator), words, mesh)


def _unfused(case: Case) -> Tensor:
    logits = matmul(case.x, case.w, LAYOUT, case.mesh)
    return vocab_parallel_cross_entropy(logits, case.target, vocab_size=case.vocab, mesh=case.mesh)


def _again(case: Case) -> Tensor:
    return linear_cross_entropy(case.x, case.w, case.target, LAYOUT, case.mesh, vocab_size=case.vocab)


def _now(case: Case) -> Tensor:
    return linear_cross_entropy(case.x, case.w, case.target, LAYOUT, case.mesh, vocab_size=case.vocab, grads="forward")


def _by_hand(case: Case) -> Tensor:
    made: Tensor = _ByHand.apply(case.x, case.w, case.target, case.vocab, case.mesh)
    return made


class _ByHand(torch.autograd.Function):
    """The mean loss as one would write it for one model: chunks of 256 tokens, computed again in backward."""

    CHUNK = 256

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, target: Tensor, vocab: int, mesh: DeviceMesh) -> Tensor:
        group, rank = mesh.get_group("tp"), mesh.get_local_rank("tp")
        start, here = chunk(vocab, mesh.size(), rank)
        sums = []
        total = torch.zeros(())
        for xc, tc in zip(x.split(_ByHand.CHUNK), target.split(_ByHand.CHUNK)):
            z = (xc @ w.t()).float()
            top = z.amax(-1)
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
            local, mine = (tc - start).clamp(0, here - 1), (tc >= start) & (tc < start + here)
            picked = z.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0)
            both = torch.stack((z.sub_(top.unsqueeze(-1)).exp_().sum(-1), picked))
            dist.all_reduce(both, group=group)
            sums.append(top + both[0].log())
            total += (sums[-1] - both[1]).sum()
        ctx.save_for_backward(x, w, target, torch.cat(sums))
        ctx.where = group, start, here
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, target, sums = ctx.saved_tensors
        group, start, here = ctx.where
        dx, dw = torch.empty_like(x), torch.zeros(w.shape)
        for at in range(0, len(x), _ByHand.CHUNK):
            rows = slice(at, at + _ByHand.CHUNK)
            p = (x[rows] @ w.t()).float().sub_(sums[rows].unsqueeze(-1)).exp_()
            tokens = ((target[rows] >= start) & (target[rows] < start + here)).nonzero().squeeze(-1)
            p[tokens, target[rows][tokens] - start] -= 1
            dz = p.mul_(grad / len(x)).to(x.dtype)
            torch.mm(dz, w, out=dx[rows])
            dw.addmm_(dz.float().t(), x[rows].float())
        dist.all_reduce(dx, group=group)
        return dx, dw.to(w.dtype), None, None, None


def _torchs(case: Case) -> Tensor:
    """torch's own, of one rank alone, by its defaults."""
    options: Any = torch.nn.LinearCrossEntropyOptions()
    made: Tensor = F.linear_cross_entropy(case.x, case.w, case.target, options=options)
    return made


def contenders(ranks: int) -> dict[str, Callable[[Case], Tensor]]:
    """The loss by each of them; torch's own, on one rank, where this torch has one."""
    found: dict[str, Callable[[Case], Tensor]] = {UNFUSED: _unfused, AGAIN: _again, NOW: _now, HAND: _by_hand}
    return found | ({TORCH: _torchs} if ranks == 1 and hasattr(F, "linear_cross_entropy") else {})


def peak_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """The most bytes that a call has allocated at once, of those that it allocates, and its largest tensor: told by
    torch's allocator of CPU memory."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = call()  # held to the end
    del kept
    now = most = 0
    changes = shim.allocations(record)
    for change in changes:
        now += change
        most = max(most, now)
    return most, max(changes)


def _step(loss: Callable[[Case], Tensor], case: Case) -> None:
    case.x.grad = case.w.grad = None
    loss(case).backward()


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one size and dtype. peak: bytes of the rank with most, above x, W, dX and dW. time: seconds of
    forward and backward, of the slowest rank. peak_ratio, time_ratio: to the logits at once."""

    dtype: str
    size: Size
    name: str
    peak: int
    peak_ratio: float
    time: Spread | None
    time_ratio: Spread | None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def measure(sizes: Sequence[Size], dtypes: Sequence[torch.dtype], rounds: int) -> Iterator[Row]:
    """Measure on the ranks of the default group. rounds: of times; 0: none."""
    ranks = dist.get_world_size()
    mesh = DeviceMesh("cpu", list(range(ranks)), mesh_dim_names=("tp",))
    for dtype in dtypes:
        for size in sizes:
            case = Case.of(size, dtype, mesh)
            steps = {name: partial(_step, loss, case) for name, loss in contenders(ranks).items()}
            _step(_again, Case.of((16, 8, 2 * ranks), dtype, mesh))  # what is built and compared once
            peaks = {}
            for name, step in steps.items():
                case.x.grad = case.w.grad = None
                peaks[name] = int(slowest_rank([float(peak_bytes(step)[0])])[0]) - case.x.nbytes - case.w.nbytes
            times = (
                in_turns(steps, rounds, turn=0.0, meet=dist.barrier, slowest=slowest_rank, warm_up=0) if rounds else {}
            )
            for name in steps:
                seconds = times[name][0] if times else None
                yield Row(
                    str(dtype).removeprefix("torch."),
                    size,
                    name,
                    peaks[name],
                    peaks[name] / peaks[UNFUSED],
                    Spread.of(seconds) if seconds else None,
                    ratio(seconds, times[UNFUSED][0]) if seconds else None,
                )


def draw(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """Peak memory and time of each contender, over those of the logits at once; a panel each.

    note: of the machine.
    """
    from shardgrad import charts  # matplotlib takes its time

    cases = list(dict.fromkeys((row.dtype, row.size) for row in rows))
    names = [name for name in dict.fromkeys(row.name for row in rows) if name != UNFUSED]
    with charts.chart(path, "A head's product and its loss in one, over logits at once", (9, 3.8), note) as figure:
        memory, time = figure.subplots(1, 2)
        for at, name in enumerate(names):
            these = [row for row in rows if row.name == name]
            places = [cases.index((row.dtype, row.size)) + 0.12 * (at - (len(names) - 1) / 2) for row in these]
            memory.plot(places, [row.peak_ratio for row in these], linestyle="", label=name, **charts.look(at))
            timed = [(place, row.time_ratio) for place, row in zip(places, these) if row.time_ratio is not None]
            charts.spreads(time, [x for x, _ in timed], [ratio for _, ratio in timed], at, name, line=False)
        for panel, what, bar in ((memory, "peak memory; dashed: 1/8", 1 / 8), (time, "time", 1)):
            charts.line_at(panel, bar)
            charts.plain(panel, "y", what)
            panel.set_xticks(
                range(len(cases)), [f"{dtype}\n{' × '.join(map(str, size))}" for dtype, size in cases], fontsize=7.5
            )
        memory.set_ylim(bottom=0)
        charts.legend_of(figure, memory)
