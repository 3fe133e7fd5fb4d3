"""A decoder of today, sharded by hand: rotary and learned positions, shared KV heads, three norms, smoothed labels.

One device has functions of torch where the sharded one writes them out, or the reverse. Every function that may go
wrong is an attribute, so that a bug can be planted into one place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.mutants.by_hand import Column, CrossEntropy, Embedding, Group, Row, Shard, drawn, own_targets, program_of
from shardgrad.mutants.mutant import Program

ROWS, D, HEADS, KV_HEADS, HEAD_DIM, M, VOCAB = 24, 12, 48, 24, 4, 24, 36  # even over 1, 2, 3 and 4 ranks
SMOOTHING, BASE, IGNORED, EPS = 0.1, 100.0, -100, 1e-3


def rotated(x: Tensor, positions: Tensor, base: float = BASE) -> Tensor:
    """Rotary positions of x [heads, rows, features], by halves."""
    half = x.shape[-1] // 2
    rates = base ** (torch.arange(half).to(x) / -half)
    angles = positions.to(x)[:, None] * rates
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Attend(nn.Module):
    """Causal attention; q [rows, heads · features], k and v of half as many heads."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: Callable[[int], Tensor] = torch.arange  # of queries
        self.base, self.scale = BASE, HEAD_DIM**-0.5
        self.share: Callable[[Tensor], Tensor] = lambda x: x.repeat_interleave(HEADS // KV_HEADS, 0)
        self.mask: Callable[[int], Tensor] = lambda rows: torch.ones(rows, rows, dtype=torch.bool).tril()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for t in (q, k, v))
        q = rotated(q, self.positions(q.shape[1]), self.base)
        k = rotated(k, torch.arange(k.shape[1]), self.base)
        scores = q @ self.share(k).transpose(1, 2) * self.scale
        scores = scores.masked_fill(~self.mask(q.shape[1]), float("-inf"))
        return (scores.softmax(-1) @ self.share(v)).transpose(0, 1).flatten(1)


class _Attention(nn.Module):
    """The same on one device."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for t in (q, k, v))
        q, k = (rotated(t, torch.arange(t.shape[1])) for t in (q, k))
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 0) for t in (k, v))
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1).flatten(1)


class Norm(Shard):
    """x over the root of its mean square (less the mean, where `centred`), times the weight."""

    def __init__(self, tp: Group, sp: bool, centred: bool) -> None:
        super().__init__()
        parameters: dict[str, tuple[tuple[int, ...], None]] = {"weight": ((D,), None)}
        self.hold(tp, **parameters, **({"bias": ((D,), None)} if centred else {}))
        self.share, self.eps = tp.copy if sp else tp.same, EPS
        self.centre: Callable[[Tensor], Tensor] = lambda x: x - x.mean(-1, keepdim=True) if centred else x
        self.square: Callable[[Tensor], Tensor] = lambda x: x.square().mean(-1, keepdim=True)
        self.root: Callable[[Tensor], Tensor] = lambda square: (square + self.eps).sqrt()
        self.scale: Callable[[Tensor], Tensor] = lambda weight: weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.centre(x)
        y = x / self.root(self.square(x)) * self.scale(self.share(self.weight))
        return y + self.share(self.bias) if hasattr(self, "bias") else y


class _RMSNorm(nn.Module):
    """Written out, on one device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.weight


class Places(Shard):
    """An embedding of each row's position; with rows sharded, of this rank's rows."""

    def __init__(self, tp: Group, sp: bool) -> None:
        super().__init__()
        self.hold(tp, weight=((2 * ROWS, D), None))
        self.start, self.share = tp.index * (ROWS // tp.size) if sp else 0, tp.copy if sp else tp.same
        self.rows = ROWS // tp.size if sp else ROWS

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(torch.arange(self.rows) + self.start, self.share(self.weight))


class _Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2 * ROWS, D))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(torch.arange(len(ids)), self.weight)


class Smoothed(CrossEntropy):
    """Cross-entropy of logits [rows, vocab/tp], labels smoothed over all classes; some rows have no target."""

    def __init__(self, tp: Group) -> None:
        super().__init__(tp)
        self.rate: float | None = SMOOTHING
        self.uniform: Callable[[Tensor, Tensor], Tensor] = lambda logits, total: (
            total.log() - self.sum(logits.sum(-1) / VOCAB)
        )
        self.total: Callable[[Tensor], Tensor] = self.sum
        self.targets: Callable[[Tensor], Tensor] = lambda targets: targets
        self.over: Callable[[Tensor], Any] = lambda kept: kept.sum()

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = self.targets(targets)
        kept = targets != IGNORED
        logits = logits - self.tp.max(logits.detach().amax(-1))[:, None]
        total = self.total(logits.exp().sum(-1))
        loss = total.log() - self.sum(own_targets(self.tp, logits, targets))
        rate = self.rate or 0.0
        loss = (1 - rate) * loss + rate * self.uniform(logits, total) if rate else loss
        return loss[kept].sum() / self.over(kept)


class Decoder(nn.Module):
    """One block; sharded over `tp`, or whole where tp is None."""

    tp: Any

    def __init__(self, tp: Group | None, sp: bool = False) -> None:
        super().__init__()
        self.tp, width, shared = tp, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        column = nn.Linear if tp is None else partial(_sharded, Column, tp, sp)
        row = nn.Linear if tp is None else partial(_sharded, Row, tp, sp)
        self.embedding = nn.Embedding(VOCAB, D) if tp is None else Embedding(tp, VOCAB, D, sp)
        self.places = _Places() if tp is None else Places(tp, sp)
        self.norm1 = _RMSNorm() if tp is None else Norm(tp, sp, False)
        self.norm2 = nn.LayerNorm(D, eps=EPS) if tp is None else Norm(tp, sp, True)
        self.norm3 = nn.RMSNorm(D, eps=EPS) if tp is None else Norm(tp, sp, False)
        self.query, self.key, self.value = column(D, width), column(D, shared), column(D, shared)
        self.attend, self.out = _Attention() if tp is None else Attend(), row(width, D)
        self.up, self.act, self.down = column(D, M), _Act(), row(M, D)
        self.head = column(D, VOCAB)
        whole = nn.CrossEntropyLoss(label_smoothing=SMOOTHING, ignore_index=IGNORED)
        self.criterion = whole if tp is None else Smoothed(tp)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids) + self.places(ids)
        h = self.norm1(x)
        x = x + self.out(self.attend(self.query(h), self.key(h), self.value(h)))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        return self.criterion(self.head(self.norm3(x)), targets)


def _sharded(layer: Any, tp: Group, sp: bool, d: int, m: int) -> Any:
    return layer(tp, d, m, sp)


class _Act(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.function: Callable[[Tensor], Tensor] = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def program(mesh: DeviceMesh, *, sp: bool = False, dtype: torch.dtype = torch.float32) -> Program:
    """The working program, on a mesh with the axis `tp`, with the same values on each call."""
    generator = torch.Generator().manual_seed(11)
    tp = Group(mesh)
    parallel, single = Decoder(tp, sp), Decoder(None)
    drawn(single, generator)
    ids, targets = (torch.randint(0, VOCAB, (ROWS,), generator=generator) for _ in range(2))
    targets[[2, 3, 11]] = IGNORED
    return program_of(parallel.to(dtype), single.to(dtype), [ids, targets], mesh, tp)
