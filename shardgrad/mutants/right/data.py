"""Right programs: batches that are sharded, divided, or no plain tensors; two axes; what is computed again."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from shardgrad.mutants.by_hand import Group
from shardgrad.mutants.mutant import Program
from shardgrad.mutants.right.kind import (
    FULL,
    TERM,
    Column,
    Kind,
    Row,
    both,
    called,
    column,
    fill,
    over_dp,
    part,
    program,
    randint,
    randn,
    row,
)
from shardgrad.mutants.right.mlps import Between, Mlp

D, M, OUT, ROWS = 10, 24, 3, 12


def _plain(act: Callable[[], nn.Module] = nn.GELU) -> nn.Module:
    return nn.Sequential(nn.Linear(D, M), act(), nn.Linear(M, OUT))


def _mean(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def _sum(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().sum()


def _term(dp: Group, model: nn.Module, x: Tensor) -> Tensor:
    return _mean(model, x) / dp.size


def _by_hooks(act: Callable[[], nn.Module], rows: int, loss: Callable[..., Tensor], **given: Any) -> Any:
    return over_dp(lambda _: _plain(act), rows, loss, **given)


def _summed(bucket: Any) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _ddp(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    mesh = called(mesh, "dp")
    dp, single, x = Group(mesh, "dp"), _plain(), randn(ROWS, D)
    fill(single)
    parallel = DistributedDataParallel(_plain().to(dtype), process_group=dp.group)
    parallel.register_comm_hook(
        None, lambda state, bucket: _summed(bucket)
    )  # it refuses other annotations than its own
    made = program(
        mesh, dtype, parallel, single, [x], axis="dp", loss=_mean, splits=TERM,
        parallel_loss=partial(_term, dp), parallel_batch=[dp.slice(x).to(dtype)],
        names={f"module.{name}": name for name, _ in single.named_parameters()},
    )  # fmt: skip
    made.names = lambda name: name.removeprefix("module.")
    return made


def _fsdp(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    """FSDP2, which averages: told to divide by one, so that terms are summed."""
    mesh = called(mesh, "dp")
    dp, parallel, single, x = Group(mesh, "dp"), _plain().to(dtype), _plain().to(dtype), randn(ROWS, D)
    fill(single)
    parallel.load_state_dict(single.state_dict())
    for layer in (*parallel.children(), parallel):
        unit = fully_shard(layer, mesh=mesh)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return Program(
        parallel, single, [x.to(dtype)], mesh, lambda _: None, lambda _: 1.0, loss=_mean, splits=TERM,
        parallel_loss=partial(_term, dp), parallel_batch=[dp.slice(x).to(dtype)],
    )  # fmt: skip


def _micro(model: nn.Module, x: Tensor) -> Tensor:
    """Two halves of the batch, one after the other; the second's loss is returned with the first's value."""
    parts = [(model(part) - 1).square().sum() / (OUT * len(x)) for part in x.chunk(2)]
    return parts[0] + parts[1]


def _accumulated(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    """Backward of all micro-batches but the last is within forward, as a training step has it."""
    return program(
        mesh, dtype, Between(Group(mesh), F.gelu, OUT), Between(None, F.gelu, OUT), [randn(ROWS, D)],
        loss=lambda model, x: (model(x) - 1).square().sum() / (OUT * len(x)), parallel_loss=_micro,
    )  # fmt: skip


class _Again(nn.Module):
    def __init__(self, tp: Group | None, reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.reentrant = Mlp(tp, F.gelu, blocks=2), reentrant
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        if self.tp is None:
            return self.blocks(x).square()
        return checkpoint(self.blocks, x, use_reentrant=self.reentrant).square()


def _grid(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    """Rows over dp, features over tp: of four ranks two each, of fewer all over dp or all over tp."""
    size = mesh.size()
    both_axes = init_device_mesh("cpu", (2, 2) if size == 4 else (1, size), mesh_dim_names=("dp", "tp"))
    dp, tp = Group(both_axes, "dp"), Group(both_axes, "tp")
    parallel, single, x = Between(tp, F.silu, OUT), Between(None, F.silu, OUT), randn(ROWS, D)
    for parameter in parallel.parameters():
        parameter.register_hook(dp.sum)
    names = {"up.weight": "W[m/tp,d]", "up.bias": "b[m/tp]", "down.weight": "W[o,m/tp]", "up": "Y[n/dp,m/tp]"}
    return program(
        both_axes, dtype, parallel, single, [x], loss=_mean, splits={**TERM, **names},
        parallel_loss=partial(_term, dp), parallel_batch=[dp.slice(x).to(dtype)],
    )  # fmt: skip


def _fully(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    """A row product over rows of the grid, a column product over columns: [m/r, d/c]."""
    size = mesh.size()
    grid = init_device_mesh("cpu", (2, 2) if size == 4 else (1, size), mesh_dim_names=("r", "c"))
    r, c = Group(grid, "r"), Group(grid, "c")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(M // r.size, ROWS // c.size))

        def forward(self, x: Tensor) -> Tensor:
            own = r.copy(c_slice(x))
            return c.reduce(own @ self.weight.T)

    def c_slice(x: Tensor) -> Tensor:
        return c.slice_rows(x.transpose(0, 1)).transpose(0, 1)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(M, ROWS))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    return program(
        grid, dtype, Layer(), Whole(), [randn(7, ROWS)], axis="c",
        storage={"weight": lambda w: part(part(w, 0, r), 1, c)}, splits={"weight": "W[m/r,d/c]"},
    )  # fmt: skip


@dataclass
class _Output:
    """As models of transformers return it, when asked for no tuple."""

    loss: Tensor | None
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class _Named(nn.Module):
    """Takes keywords, also nested ones, and returns a dict, or an object with a loss."""

    def __init__(self, tp: Group | None, returns: str = "dict") -> None:
        super().__init__()
        self.returns, self.up, self.down = returns, column(tp, D, M), row(tp, M, OUT)

    def forward(self, x: Tensor, labels: Tensor | None = None, extra: Any = None) -> Any:
        h = F.gelu(self.up(x))
        logits = self.down(h)
        if extra is not None:
            logits = logits * extra["scale"] + sum(extra["shifts"])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if self.returns == "dict":
            return {"loss": loss, "logits": logits}
        if self.returns == "logits first":
            return {"logits": logits, "loss": loss}
        if self.returns == "tuple":
            return loss, logits
        return _Output(loss, logits, (h,))


def _named(returns: str, **batch: Any) -> Any:
    given = {"x": randn(ROWS, D), "labels": randint(OUT, ROWS), **batch}
    return both(lambda tp: _Named(tp, returns), given)


def _user_dict(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    batch: Any = UserDict(x=randn(ROWS, D), labels=randint(OUT, ROWS))
    return program(mesh, dtype, _Named(Group(mesh)), _Named(None), batch)


def _nested(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    """Floating tensors within what the batch holds."""
    extra = {"scale": randn(OUT, seed=8), "shifts": [randn(OUT, seed=9), 2.0]}
    batch = {"x": randn(ROWS, D), "labels": randint(OUT, ROWS), "extra": extra}
    return program(mesh, dtype, _Named(Group(mesh)), _Named(None), batch)


def _adam(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    return program(
        mesh, dtype, Mlp(Group(mesh), F.gelu), Mlp(None, F.gelu), [randn(ROWS, D)],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    )  # fmt: skip


def _clip(model: nn.Module, max_norm: float) -> Tensor:
    """By the norm of all gradients: shards are summed over the ranks, replicas counted once."""
    tp, square = next(m.tp for m in model.modules() if isinstance(m, Column | Row)), torch.zeros(2, dtype=torch.float64)
    sharded = {id(p) for m in model.modules() for n, p in m.named_parameters(recurse=False)
               if getattr(m, "storage", {}).get(n) is not None}  # fmt: skip
    for parameter in model.parameters():
        assert parameter.grad is not None
        square[int(id(parameter) in sharded)] += parameter.grad.double().square().sum()
    norm = (square[0] + tp.sum(square[1])).sqrt()
    for parameter in model.parameters():
        parameter.grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))  # type: ignore[union-attr]
    return norm


KINDS = [
    Kind("rows over dp, summed by hooks", _by_hooks(nn.GELU, ROWS, _mean, term=_term)),
    Kind("rows over dp, a loss that is a sum, ReLU", _by_hooks(nn.ReLU, 4 * ROWS, _sum)),
    Kind("rows over dp, uneven", _by_hooks(nn.GELU, 11, lambda model, x: _sum(model, x) / 11)),
    Kind(
        "rows over dp, the loss summed",
        _by_hooks(nn.GELU, ROWS, _mean, splits={}, term=lambda dp, model, x: dp.reduce(_term(dp, model, x))),
    ),
    Kind("DistributedDataParallel, summed", _ddp),
    Kind("fully_shard, summed", _fsdp),
    Kind("micro-batches", _accumulated),
    Kind("checkpointing", both(lambda tp: _Again(tp, False), [randn(ROWS, D)])),
    Kind("checkpointing, reentrant", both(lambda tp: _Again(tp, True), [randn(ROWS, D)])),
    Kind("rows over dp, features over tp", _grid),
    Kind("a weight sharded over a grid", _fully),
    Kind("a dict is returned", _named("dict")),
    Kind("a dict is returned, logits first", _named("logits first")),
    Kind("a tuple is returned", _named("tuple")),
    Kind("an object with a loss is returned", _named("object")),
    Kind("a UserDict comes in", _user_dict),
    Kind("floats within the batch", _nested),
    Kind("AdamW", _adam, FULL),
    Kind("clipped by hand", both(lambda tp: Mlp(tp, F.gelu), [randn(ROWS, D)], clip=_clip)),
]
