"""Data parallelism with micro-batches, done by hand, and bugs in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.mutants import mutant
from shardgrad.mutants.by_hand import Group
from shardgrad.mutants.mutant import MADE_UP, Mutant, Program, enters

NAME = "micro-batches"
ROWS, IDS, D, M, CLASSES, MICRO = 24, 20, 10, 14, 9, 2
MUTANTS: list[Mutant] = []
sets = partial(mutant.sets, enters(MUTANTS))


class Model(nn.Module):
    """Rows are sharded over the ranks; each rank has some micro-batches, whose gradients are summed as they arrive.

    reduce: what is done to a gradient as it arrives, by parameter. weigh: what a micro-batch's term of the loss is
    multiplied with. between: what is done after each backward but the last. rows: those of this rank.
    """

    def __init__(self, dp: Group | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Embedding(IDS, D), nn.Linear(D, M), nn.GELU(), nn.LayerNorm(M), nn.Linear(M, CLASSES)
        )
        self.dp: Any = dp
        self.reduce: Callable[[Tensor, str], Tensor] = lambda gradient, name: self.dp.sum(gradient)
        self.weigh: Callable[[int], float] = lambda at: 1.0
        self.between: Callable[[], None] = lambda: None
        self.rows: Callable[[Tensor], Tensor] = dp.slice if dp else lambda t: t
        if dp:
            for name, parameter in self.named_parameters():
                parameter.register_hook(lambda gradient, name=name: self.reduce(gradient, name))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(ids)


def _whole(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _accumulated(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Backward of all micro-batches but the last, and the whole loss, which is differentiated for that one."""
    x, y = model.rows(x), model.rows(y)
    right = torch.zeros(())
    for at, (inputs, targets) in enumerate(zip(x.chunk(MICRO), y.chunk(MICRO))):
        term = F.cross_entropy(model(inputs), targets, reduction="sum") / ROWS
        right = right + term.detach()
        term = term * model.weigh(at)
        if at < MICRO - 1:
            term.backward()
            model.between()
    return term - term.detach() + model.dp.sum(right)


def program(mesh: DeviceMesh) -> Program:
    generator = torch.Generator().manual_seed(5)
    dp = Group(mesh)
    parallel, single = Model(dp), Model()
    with torch.no_grad():
        for parameter in single.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    batch = [torch.randint(0, most, (ROWS,), generator=generator) for most in (IDS, CLASSES)]

    def load(source: nn.Module) -> None:
        parallel.load_state_dict(source.state_dict())

    load(single)
    whole: Any = _whole
    return Program(parallel, single, batch, mesh, load, lambda name: 1 / dp.size, whole, _accumulated, clip=_clip)


def _clip(model: nn.Module, max_norm: float) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


_LEFT, _WEIGHTED = "rows left out", "rows weighted otherwise"


sets("the last rank's term is dropped", NAME, _LEFT, "reduce",
     lambda m: lambda g, name: m.dp.sum(g if m.dp.index < m.dp.size - 1 else torch.zeros_like(g)))  # fmt: skip
sets("zero_grad between micro-batches", NAME, _LEFT, "between", lambda m: lambda: m.zero_grad())
sets("the last micro-batch does not count", NAME, _LEFT, "weigh", lambda m: lambda at: float(at < MICRO - 1))
sets("the first rank drops its last micro-batch", NAME, _LEFT, "weigh",
     lambda m: lambda at: float(at < MICRO - 1 or m.dp.index > 0))  # fmt: skip
sets("a rank's gradient counts twice", NAME, _WEIGHTED, "reduce",
     lambda m: lambda g, name: m.dp.sum(g * (2.0 if m.dp.index == 0 else 1.0)))  # fmt: skip
sets("ranks that weigh their rows otherwise", NAME, _WEIGHTED, "weigh", lambda m: lambda at: 0.8 + 0.3 * m.dp.index,
     "a mean of means over ranks with unlike numbers of tokens")  # fmt: skip
sets("each rank clips its gradient before the sum", NAME, _WEIGHTED, "reduce",
     lambda m: lambda g, name: m.dp.sum(g * torch.clamp(0.05 / g.norm(), max=1.0)))  # fmt: skip
sets("every rank takes the first rank's rows", NAME, _WEIGHTED, "rows", lambda m: lambda t: t.chunk(m.dp.size)[0])
sets("gradients are divided by a wrong number of rows", NAME, "scaled by a constant", "weigh",
     lambda m: lambda at: 1 / (MICRO * m.dp.size * 1.25))  # fmt: skip
sets("gradients of micro-batches are summed in bfloat16", NAME, "rounded to bfloat16 in a reduction", "reduce",
     lambda m: lambda g, name: m.dp.sum(g.bfloat16().to(g)))  # fmt: skip
sets("gradients are summed in float16", NAME, "rounded to float16 in a reduction", "reduce",
     lambda m: lambda g, name: m.dp.sum(g.half().to(g)))  # fmt: skip
sets("gradients are not summed over the ranks", NAME, "sum over tp missing", "reduce", lambda m: lambda g, name: g)
sets("gradients are summed twice", NAME, "summed twice over tp", "reduce",
     lambda m: lambda g, name: m.dp.sum(m.dp.sum(g)))  # fmt: skip


def _own_norm(how: Callable[[Tensor, Any], Tensor]) -> Callable[[Program], None]:
    """The norm is taken of gradients that are not summed yet."""

    def plant(program: Program) -> None:
        parallel: Any = program.parallel
        own: dict[str, Tensor] = {}

        def reduce(gradient: Tensor, name: str) -> Tensor:
            own[name] = own[name] + gradient if name in own else gradient.clone()
            return parallel.dp.sum(gradient)

        def clip(model: nn.Module, max_norm: float) -> Tensor:
            square = torch.stack([gradient.double().square().sum() for gradient in own.values()]).sum()
            own.clear()
            norm = how(square, parallel.dp).to(torch.float32)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0).to(parameter.grad))
            return norm

        parallel.reduce, program.clip = reduce, clip

    return plant


for _name, _how in (
    ("the norm is of each rank's own gradients, before the sum", lambda square, dp: square.sqrt()),
    ("the norm adds up squares of gradients before the sum", lambda square, dp: dp.sum(square).sqrt()),
):
    MUTANTS.append(Mutant(_name, NAME, _own_norm(_how), MADE_UP, "clipped before the reduction"))
