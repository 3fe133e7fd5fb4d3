"""Right programs: two products with something between them, sharded by hand in Megatron-LM's way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.mutants.by_hand import Group
from shardgrad.mutants.right.kind import (
    FULL,
    Kind,
    Storage,
    Stored,
    both,
    column,
    mean_square,
    part,
    program,
    randn,
    row,
)
from shardgrad.verification.observed import Split

D, M, ROWS = 10, 24, 12
Act = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    """As many blocks of up, act, down as asked, each added to what enters it."""

    def __init__(self, tp: Group | None, act: Act, m: int = M, d: int = D, blocks: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.act = act
        self.up = nn.ModuleList([column(tp, d, m, bias) for _ in range(blocks)])
        self.down = nn.ModuleList([row(tp, m, d, bias) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down):
            x = x + down(self.act(up(x)))
        return x


class Between(nn.Module):
    """Two products, and something done with the sharded features between them."""

    def __init__(self, tp: Group | None, what: Act, out: int = D) -> None:
        super().__init__()
        self.up, self.what, self.down = column(tp, D, M), what, row(tp, M, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.what(self.up(x)))


def _mlp(act: Act, scale: float = 1.0, rows: int = ROWS, **given: Any) -> Any:
    return both(lambda tp: Mlp(tp, act, **given), [randn(rows, given.get("d", D)) * scale])


class _SwiGlu(nn.Module):
    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.gate, self.up, self.down = column(tp, D, M, False), column(tp, D, M, False), row(tp, M, D, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def halves(tp: Group | None) -> Storage:
    """Of gate and up in one matrix, [2 m/tp, d]: a rank's rows of either."""
    return 0 if tp is None else lambda w: torch.cat([part(half, 0, tp) for half in w.chunk(2)])


class _Fused(nn.Module):
    """Gate and up are one matrix, in two interleaved parts."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.gate_up = column(tp, D, 2 * M, how=halves(tp))
        self.down = row(tp, M, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


_TWO = Split.of([("tp",), ()], stride=2)
_FUSED = {
    "gate_up.weight": _TWO,
    "gate_up.bias": Split.of([("tp",)], stride=2),
    "gate_up": Split.of([(), ("tp",)], stride=2),
}


class _InOut(Stored):
    """Weights [in, out], as GPT-2's Conv1D has them; `dim` 1 for columns, 0 for rows."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tp: Group, n_in: int, n_out: int, dim: int) -> None:
        super().__init__()
        self.hold(tp, weight=((n_in, n_out), dim), bias=((n_out,), 0 if dim else None))
        self.columns = dim == 1

    def forward(self, x: Tensor) -> Tensor:
        if self.columns:
            return self.tp.copy(x) @ self.weight + self.bias
        return self.tp.reduce(x @ self.weight) + self.bias


class _Plain(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _in_out(tp: Group | None) -> nn.Module:
    if tp is None:
        return nn.Sequential(_Plain(D, M), nn.GELU(approximate="tanh"), _Plain(M, D))
    return nn.Sequential(_InOut(tp, D, M, 1), nn.GELU(approximate="tanh"), _InOut(tp, M, D, 0))


class _SumOutside(nn.Module):
    """The row product is a plain Linear on each rank; its sum is made after the layer has returned."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp, local = tp, M if tp is None else part(torch.zeros(M), 0, tp).numel()
        self.up = column(tp, D, M)
        self.down = nn.Linear(local, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        return y if self.tp is None else self.tp.reduce(y)


class _Sequence(nn.Module):
    """Rows sharded around the block: the norm's gradients are summed, rows gathered and scattered. Result: this
    rank's rows."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp, self.norm = tp, nn.LayerNorm(D)
        self.up, self.down = column(tp, D, M, sp=True), row(tp, M, D, sp=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.tp is None:
            return x + self.down(F.gelu(self.up(self.norm(x))))
        x = self.tp.slice_rows(x)
        weight, bias = self.tp.copy(self.norm.weight), self.tp.copy(self.norm.bias)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (D,), weight, bias))))


class _MixedNorm(nn.Module):
    """Its norm is float32 whatever the products are."""

    def __init__(self, tp: Group | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up, self.down = column(tp, D, M).to(dtype), row(tp, M, D).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x.to(self.norm.weight.dtype)).to(x.dtype))))


def _mixed(mesh: Any, dtype: torch.dtype) -> Any:
    parallel, single = _MixedNorm(Group(mesh), dtype), _MixedNorm(None, dtype)
    return program(mesh, dtype, parallel, single, [randn(ROWS, D)], cast=False)


def _autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float().square().mean()


def _trunk(tp: Group | None) -> nn.Module:
    return nn.Sequential(column(tp, D, M), nn.ReLU(), nn.Dropout(0.5), row(tp, M, D)).eval()


class _Twice(nn.Module):
    """The same two layers used twice."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.up, self.down = column(tp, D, M), row(tp, M, D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(torch.tanh(self.up(x)))
        return x


class _Normalised(Between):
    """Weight norm: rows of a direction scaled to a length, both sharded by rows."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__(tp, F.gelu)
        self.up = nn.utils.parametrizations.weight_norm(self.up)
        if tp is not None:
            self.storage: dict[str, Storage] = {
                f"up.parametrizations.weight.original{at}": 0 for at in (0, 1)
            }  # fmt: skip


class _LoRA(nn.Module):
    """A frozen column or row layer and an adapter; of a row's, A is sharded along what it contracts and what it
    returns is a term of a sum, added up with the layer's own."""

    def __init__(self, tp: Group | None, rank: int = 3) -> None:
        super().__init__()
        self.tp = tp
        self.up, self.down = column(tp, D, M), row(tp, M, D, bias=False)
        for layer in (self.up, self.down):
            layer.requires_grad_(False)
        local = M if tp is None else part(torch.zeros(M), 0, tp).numel()
        self.up_a, self.up_b = nn.Linear(D, rank, bias=False), nn.Linear(rank, local, bias=False)
        self.down_a, self.down_b = nn.Linear(local, rank, bias=False), nn.Linear(rank, D, bias=False)
        if tp is not None:
            self.storage: dict[str, Storage] = {"up_b.weight": 0, "down_a.weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        copy, reduce = (self.tp.copy, self.tp.reduce) if self.tp is not None else (lambda x: x, lambda x: x)
        h = F.silu(self.up(x) + self.up_b(copy(self.up_a(x))))
        return x + self.down(h) + self.down_b(reduce(self.down_a(h)))


class _RowLoRA(_LoRA):
    """The row's adapter is summed after B: what A and B return are terms of it, and B's gradient is summed."""

    def forward(self, x: Tensor) -> Tensor:
        if self.tp is None:
            return super().forward(x)
        h = F.silu(self.up(x) + self.up_b(self.tp.copy(self.up_a(x))))
        term = F.linear(self.down_a(h), self.tp.copy(self.down_b.weight))
        return x + self.down(h) + self.tp.reduce(term)


class _SequenceFirst(nn.Module):
    """[b,s,d] comes in and goes out; inside, the parallel model has the sequence first, as Megatron-LM does."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp, self.up, self.down = tp, column(tp, D, M), row(tp, M, D)

    def forward(self, x: Tensor) -> Tensor:
        turned = x if self.tp is None else x.transpose(0, 1).contiguous()
        y = self.down(F.gelu(self.up(turned)))
        return y if self.tp is None else y.transpose(0, 1)


def _maxout(h: Tensor) -> Tensor:
    return h.unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1)


def _kinks(act: type[nn.Module], blocks: int = 2) -> Any:
    """Of so many elements some lie on a kink in 16 bits, where rounding decides which slope a gradient meets."""

    def build(tp: Group | None) -> nn.Module:
        return nn.Sequential(*[m for _ in range(blocks) for m in (column(tp, 32, 120), act(), row(tp, 120, 32))])

    return both(build, [randn(128, 32, seed=50)])


def _sparse(tp: Group | None) -> nn.Module:
    return Mlp(tp, F.relu)


KINDS = [
    Kind("GELU", _mlp(F.gelu)),
    Kind("ReLU", _mlp(F.relu)),
    Kind("ReLU, two blocks, 128 rows", _mlp(F.relu, rows=128, blocks=2, d=32, m=96)),
    Kind("ReLU, many kinks", _kinks(nn.ReLU)),
    Kind("ReLU, many kinks, four blocks", _kinks(nn.ReLU, 4)),
    Kind("leaky ReLU, many kinks", _kinks(nn.LeakyReLU)),
    Kind("hard tanh, many kinks", _kinks(nn.Hardtanh)),
    Kind("hard shrink, many kinks", _kinks(nn.Hardshrink)),
    Kind("SiLU", _mlp(F.silu)),
    Kind("ReLU²", _mlp(lambda h: F.relu(h).square())),
    Kind("leaky ReLU, 96 rows", _mlp(F.leaky_relu, rows=96, m=48, blocks=2)),
    Kind("hard tanh, 96 rows", _mlp(F.hardtanh, rows=96, m=48, blocks=2)),
    Kind("clamp", _mlp(lambda h: h.clamp(-0.5, 0.5), rows=48, blocks=2)),
    Kind("absolute value", _mlp(torch.abs, rows=48, blocks=2)),
    Kind("maxout", _mlp(_maxout, rows=48)),
    Kind("ELU, four blocks", _mlp(F.elu, blocks=4)),
    Kind("SwiGLU", both(_SwiGlu, [randn(ROWS, D)])),
    Kind("gate and up in one matrix", both(_Fused, [randn(ROWS, D)], splits=_FUSED)),
    Kind("no biases", _mlp(F.gelu, bias=False)),
    Kind("weights [in, out]", both(_in_out, [randn(ROWS, D)])),
    Kind("uneven sizes", _mlp(F.gelu, m=23, d=7)),
    Kind("ranks without a shard", _mlp(F.gelu, m=3)),
    Kind("one feature", _mlp(torch.tanh, m=1)),
    Kind("inputs of 1e-4", _mlp(F.gelu, scale=1e-4)),
    Kind("inputs of 1e4", _mlp(F.silu, scale=1e4), (torch.float32, torch.bfloat16)),
    Kind("inputs of 100 in ReLU", _mlp(F.relu, scale=100.0)),
    Kind("mostly zeros", both(_sparse, [randn(ROWS, D) * (randn(ROWS, D, seed=6) > 1)])),
    Kind("rows that are all alike", both(_sparse, [randn(1, D).repeat(ROWS, 1)])),
    Kind("sum made outside of the layer, said", both(_SumOutside, [randn(ROWS, D)],
         storage={"down.weight": 1}, splits={"down": "Y[n,d]{tp}"})),
    Kind("sum made outside of the layer, not said", both(_SumOutside, [randn(ROWS, D)], storage={"down.weight": 1})),
    Kind("sharded rows", both(_Sequence, [randn(ROWS, D)])),
    Kind("sharded rows, a loss of a term each", both(_Sequence, [randn(ROWS, D)], loss=mean_square,
         parallel_loss=lambda model, x: model(x).float().square().sum() / x.numel(), splits={"loss": "L[]{tp}"})),
    Kind("norm in float32", _mixed),
    Kind("autocast", both(lambda tp: Mlp(tp, F.gelu), [randn(ROWS, D)], loss=_autocast), FULL),
    Kind("dropout in eval", both(_trunk, [randn(ROWS, D)])),
    Kind("one layer used twice", both(_Twice, [randn(ROWS, D)])),
    Kind("weight norm", both(_Normalised, [randn(ROWS, D)])),
    Kind("LoRA", both(_LoRA, [randn(ROWS, D)])),
    Kind("LoRA, summed after B", both(_RowLoRA, [randn(ROWS, D)])),
    Kind("sequence first inside", both(_SequenceFirst, [randn(3, 5, D)])),
    Kind("sequence first inside, b = s", both(_SequenceFirst, [randn(4, 4, D)])),
]  # fmt: skip
