"""Right programs: norms, written by hand or over sharded rows and features, also of inputs with a large mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.mutants.by_hand import Group, move
from shardgrad.mutants.mutant import Program
from shardgrad.mutants.right.kind import (
    Build,
    Kind,
    Stored,
    both,
    column,
    over_dp,
    part,
    program,
    randn,
    row,
)

D, M, ROWS, EPS = 10, 24, 12, 1e-5


class _Norm(nn.Module):
    """A norm of the last dim by a function of rows, gain and bias."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def two_pass(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight + bias


def one_pass(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """E[x²] − E[x]²: of a large mean, the small difference of large numbers."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * ((x * x).mean(-1, keepdim=True) - mean * mean + EPS).rsqrt() * weight + bias


def one_pass_clamped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x * x).mean(-1, keepdim=True) - mean * mean).clamp(min=0)
    return (x - mean) / (variance + EPS).sqrt() * weight + bias


def rms(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight + bias


def rms_in_float32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype) * weight + bias


def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def torchs_rms(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS) + bias


def length(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * weight + bias


class _Block(nn.Module):
    def __init__(self, tp: Group | None, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.up, self.down = _Norm(function), column(tp, D, M), row(tp, M, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _block(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], mean: float = 0.0) -> Any:
    """The parallel model by one formula, one device by another."""

    def make(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
        batch = [randn(ROWS, D) + mean]
        return program(mesh, dtype, _Block(Group(mesh), ours), _Block(None, theirs), batch)

    return make


class _OverFeatures(Stored):
    """A LayerNorm whose features are sharded: its two means are sums over the ranks."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tp: Group, size: int) -> None:
        super().__init__()
        self.hold(tp, weight=((size,), 0), bias=((size,), 0))
        self.size, self.total = size, move(tp.sum, tp.sum)  # every rank uses each sum for its own features

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.total(x.sum(-1, keepdim=True)) / self.size
        variance = self.total(centred.square().sum(-1, keepdim=True)) / self.size
        return centred * (variance + EPS).rsqrt() * self.weight + self.bias


class _Inner(nn.Module):
    """A norm between the two products, of the sharded features."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.up, self.down = column(tp, D, M), row(tp, M, D)
        self.norm = nn.LayerNorm(M) if tp is None else _OverFeatures(tp, M)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.tanh(self.up(x))))


class _Inside(nn.Module):
    """A norm of sharded features, which are a rank's own: a BatchNorm, or a GroupNorm whose groups are sharded.

    kind: makes one of so many features.
    """

    def __init__(self, tp: Group | None, kind: Callable[[int], nn.Module]) -> None:
        super().__init__()
        local = M if tp is None else part(torch.zeros(M // 2), 0, tp).numel() * 2
        self.up, self.norm, self.down = column(tp, D, M), kind(local), row(tp, M, D)
        if tp is not None:
            self.storage = {"norm.weight": 0, "norm.bias": 0}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.norm(self.up(x))))


class _WholeBatch(nn.Module):
    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(D), column(tp, D, M), row(tp, M, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class _SyncBatch(nn.BatchNorm1d):
    """Statistics over the rows of all ranks."""

    def __init__(self, dp: Group, size: int) -> None:
        super().__init__(size)
        self.dp, self.total = dp, move(dp.sum, dp.sum)

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x) * self.dp.size
        mean = self.total(x.sum(0)) / rows
        variance = self.total((x - mean).square().sum(0)) / rows
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), 0.1)  # type: ignore[union-attr]
            self.running_var.lerp_(  # type: ignore[union-attr]
                (variance * rows / (rows - 1)).to(self.running_var), 0.1
            )  # fmt: skip
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


def _square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _term(dp: Group, model: nn.Module, x: Tensor) -> Tensor:
    return _square(model, x) / dp.size


class _DataNorm(nn.Module):
    def __init__(self, dp: Group | None) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, M), nn.BatchNorm1d(M), nn.Linear(M, 3)
        if dp is not None:
            self.norm = _SyncBatch(dp, M)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


class _SequenceNorm(nn.Module):
    """Rows are sharded, the norm's gradients are summed by hooks on its parameters."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp, self.norm = tp, _Norm(two_pass)
        self.up, self.down = column(tp, D, M, sp=True), row(tp, M, D, sp=True)
        if tp is not None:
            for parameter in self.norm.parameters():
                parameter.register_hook(tp.sum)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.tp is None else self.tp.slice_rows(x)
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _deep(function: Callable[..., Tensor]) -> Build:
    return lambda tp: nn.Sequential(*[_Block(tp, function) for _ in range(3)])


def _offset(function: Callable[..., Tensor], mean: float) -> Any:
    return both(lambda tp: _Block(tp, function), [randn(ROWS, D) + mean])


KINDS = [
    Kind("two-pass norm", _block(two_pass, torchs)),
    Kind("two-pass norm, mean 100", _block(two_pass, torchs, 100.0)),
    Kind("two-pass norm, mean 3000", _block(two_pass, torchs, 3000.0)),
    Kind("E[x²] − E[x]²", _block(one_pass, torchs)),
    Kind("E[x²] − E[x]², mean 30", _block(one_pass, torchs, 30.0)),
    Kind("E[x²] − E[x]², mean 1000", _block(one_pass, torchs, 1000.0)),
    Kind("E[x²] − E[x]², mean 1000, both", _offset(one_pass, 1000.0)),
    Kind("E[x²] − E[x]² clamped, mean 300", _block(one_pass_clamped, torchs, 300.0)),
    Kind("RMS norm by hand", _block(rms, torchs_rms)),
    Kind("RMS norm in float32, mean 50", _block(rms_in_float32, torchs_rms, 50.0)),
    Kind("norm by length", _block(length, length)),
    Kind("three blocks, two-pass", both(_deep(two_pass), [randn(ROWS, D)])),
    Kind("LayerNorm over sharded features", both(_Inner, [randn(ROWS, D)])),
    Kind(
        "GroupNorm, groups sharded", both(lambda tp: _Inside(tp, lambda m: nn.GroupNorm(m // 2, m)), [randn(ROWS, D)])
    ),
    Kind("BatchNorm of sharded features", both(lambda tp: _Inside(tp, nn.BatchNorm1d), [randn(ROWS, D)])),
    Kind("BatchNorm of a replicated batch", both(_WholeBatch, [randn(ROWS, D)])),
    Kind("BatchNorm in eval", both(lambda tp: _WholeBatch(tp).eval(), [randn(ROWS, D)])),
    Kind("BatchNorm over the rows of all ranks", over_dp(_DataNorm, 4 * ROWS, _square, term=_term)),
    Kind("sharded rows, norms summed by hooks, mean 20", both(_SequenceNorm, [randn(ROWS, D) + 20])),
]
