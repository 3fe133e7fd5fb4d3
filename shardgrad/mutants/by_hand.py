"""A transformer block sharded by hand, as Megatron-LM does it: tensor parallel, also sequence parallel.

Every layer holds the collectives that it uses as attributes, so that a bug can be planted into one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.mutants.mutant import Program

ROWS, D, HEADS, HEAD_DIM, M, VOCAB = 12, 10, 12, 2, 24, 36  # what is sharded is even over 1, 2, 3 and 4 ranks
Local = Callable[[Tensor], Tensor]


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Local, backward: Local) -> Tensor:
        ctx.backward_ = backward
        made = forward(x)
        return made.view_as(made) if made is x else made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_(gradient), None, None


def move(forward: Local, backward: Local) -> Local:
    """A differentiable function of a forward and a backward."""
    return lambda x: _Move.apply(x, forward, backward)


class Group:
    """The collectives of one axis, and what Megatron makes of them."""

    def __init__(self, mesh: DeviceMesh, axis: str = "tp") -> None:
        self.group = mesh.get_group(axis)
        self.size, self.index = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.copy = move(self.same, self.sum)
        self.reduce = move(self.sum, self.same)
        self.gather_rows = move(self.cat, self.sum_slice)
        self.scatter_rows = move(self.sum_slice, self.cat)
        self.slice_rows = move(self.slice, self.cat)

    def same(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def cat(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts)

    def slice(self, x: Tensor) -> Tensor:
        return x.chunk(self.size)[self.index].contiguous()

    def sum_slice(self, x: Tensor) -> Tensor:
        return self.slice(self.sum(x))


class Shard(nn.Module):
    """Something with parameters that lie on the ranks of a group; `sharded` says along which dim, None for replicas."""

    sharded: dict[str, int | None]
    weight: Tensor
    bias: Tensor

    def hold(self, tp: Group, **parameters: tuple[tuple[int, ...], int | None]) -> None:
        self.tp, self.sharded = tp, {}
        for name, (shape, dim) in parameters.items():
            local = [size // tp.size if at == dim else size for at, size in enumerate(shape)]
            self.register_parameter(name, nn.Parameter(torch.zeros(local)))
            self.sharded[name] = dim


class Column(Shard):
    def __init__(self, tp: Group, d: int, m: int, sp: bool) -> None:
        super().__init__()
        self.hold(tp, weight=((m, d), 0), bias=((m,), 0))
        self.enter = tp.gather_rows if sp else tp.copy

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.enter(x), self.weight, self.bias)


class Row(Shard):
    def __init__(self, tp: Group, d: int, m: int, sp: bool) -> None:
        super().__init__()
        self.hold(tp, weight=((m, d), 1), bias=((m,), None))
        self.leave = tp.scatter_rows if sp else tp.reduce
        self.share = tp.copy if sp else tp.same
        self.before, self.after = 0.0, 1.0  # times the bias is added, before and after the sum

    def forward(self, x: Tensor) -> Tensor:
        bias = self.share(self.bias)
        y = F.linear(x, self.weight)
        y = self.leave(y + self.before * bias if self.before else y)
        return y + self.after * bias if self.after else y


class Norm(Shard):
    def __init__(self, tp: Group, d: int, sp: bool) -> None:
        super().__init__()
        self.hold(tp, weight=((d,), None), bias=((d,), None))
        self.share = tp.copy if sp else tp.same
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.share(self.weight), self.share(self.bias), self.eps)


class Embedding(Shard):
    """The vocabulary is sharded."""

    def __init__(self, tp: Group, vocab: int, d: int, sp: bool) -> None:
        super().__init__()
        self.hold(tp, weight=((vocab, d), 0))
        self.leave = tp.scatter_rows if sp else tp.reduce
        self.start, self.masked = tp.index * (vocab // tp.size), True

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.start
        outside = (local < 0) | (local >= self.weight.shape[0])
        y = F.embedding(local.clamp(0, self.weight.shape[0] - 1), self.weight)
        return self.leave(y.masked_fill(outside[:, None], 0.0) if self.masked else y)


class _Attend(nn.Module):
    """Causal attention of heads that are all alike; q, k and v [rows, heads · dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = HEAD_DIM**-0.5
        self.arrange: Local = lambda y: y

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for t in (q, k, v))
        scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(
            torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1), float("-inf")
        )
        return self.arrange((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def own_targets(tp: Group, logits: Tensor, targets: Tensor) -> Tensor:
    """The logits of the targets that are among this rank's columns, zero for others."""
    local = targets - tp.index * logits.shape[-1]
    inside = (local >= 0) & (local < logits.shape[-1])
    own = logits.gather(-1, local.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    return own.masked_fill(~inside, 0.0)


class CrossEntropy(nn.Module):
    """Of logits [rows, vocab/tp]."""

    def __init__(self, tp: Group) -> None:
        super().__init__()
        self.tp, self.sum, self.scale = tp, tp.reduce, 1.0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits - self.tp.max(logits.detach().amax(-1))[:, None]
        total = self.sum(logits.exp().sum(-1))
        target = self.sum(own_targets(self.tp, logits, targets))
        return (total.log() - target).mean() * self.scale


class Model(nn.Module):
    """Embedding, one block, norm, head; sharded over `tp`, or whole where tp is None."""

    tp: Any

    def __init__(self, tp: Group | None, sp: bool = False) -> None:
        super().__init__()
        self.tp, width = tp, HEADS * HEAD_DIM
        norm = (lambda: nn.LayerNorm(D)) if tp is None else (lambda: Norm(tp, D, sp))
        column = nn.Linear if tp is None else (lambda d, m: Column(tp, d, m, sp))
        row = nn.Linear if tp is None else (lambda d, m: Row(tp, d, m, sp))
        self.embedding = nn.Embedding(VOCAB, D) if tp is None else Embedding(tp, VOCAB, D, sp)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.query, self.key, self.value, self.out = column(D, width), column(D, width), column(D, width), row(width, D)
        self.gate, self.up, self.down = column(D, M), column(D, M), row(M, D)
        self.head = column(D, VOCAB)
        self.attend = _Attend()
        self.criterion = CrossEntropy(tp) if tp is not None else nn.CrossEntropyLoss()

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids)
        h = self.norm1(x)
        x = x + self.out(self.attend(self.query(h), self.key(h), self.value(h)))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.criterion(self.head(self.norm3(x)), targets)


def shard_dims(model: nn.Module) -> dict[str, int | None]:
    """Along which dim every parameter is sharded."""
    return {
        f"{path}.{name}": dim
        for path, module in model.named_modules()
        if isinstance(module, Shard)
        for name, dim in module.sharded.items()
    }


def clip(model: Any, max_norm: float, *, times: int = 1) -> Tensor:
    """By the norm of all gradients. `times`: how often replicated ones are counted."""
    tp, dims = model.tp, shard_dims(model)
    squares = {sharded: torch.zeros((), dtype=torch.float64) for sharded in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[dims[name] is not None] += parameter.grad.double().square().sum()
    norm = (tp.sum(squares[True]) + times * squares[False]).sqrt().to(torch.float32)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad))
    return norm


def drawn(single: nn.Module, generator: torch.Generator) -> None:
    """Random values for parameters, of usual sizes."""
    with torch.no_grad():
        for name, parameter in single.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / 4 if "bias" in name else 1 + noise / 4 if "norm" in name else noise * 0.4)


def program_of(parallel: nn.Module, single: nn.Module, batch: list[Tensor], mesh: DeviceMesh, tp: Group) -> Program:
    """The program of a model that is sharded as `shard_dims` says, with the values of the one on one device."""
    dims = shard_dims(parallel)

    def load(source: nn.Module) -> None:
        values = dict(source.named_parameters())
        with torch.no_grad():
            for name, parameter in parallel.named_parameters():
                dim, value = dims[name], values[name]
                parameter.copy_(value if dim is None else value.chunk(tp.size, dim)[tp.index])

    load(single)
    letters = {0: "W[m/tp,d]", 1: "W[m,d/tp]", None: "W[m,d]"}
    splits = {n: letters[dim] for n, dim in dims.items() if "weight" in n and "norm" not in n}
    return Program(
        parallel, single, batch, mesh, load, lambda name: 1.0 if dims[name] is not None else 1 / tp.size,
        clip=clip, splits=splits,
    )  # fmt: skip


def program(mesh: DeviceMesh, *, sp: bool = False, dtype: torch.dtype = torch.float32) -> Program:
    """The working program, on a mesh with the axis `tp`, with other values on each call of the same seed."""
    generator = torch.Generator().manual_seed(7)
    tp = Group(mesh)
    parallel, single = Model(tp, sp), Model(None)
    drawn(single, generator)
    batch = [torch.randint(0, VOCAB, (ROWS,), generator=generator) for _ in range(2)]
    return program_of(parallel.to(dtype), single.to(dtype), batch, mesh, tp)
