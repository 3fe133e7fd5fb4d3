"""Right programs: attention whose heads are sharded, in the ways in which models have it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.mutants.by_hand import Group, move
from shardgrad.mutants.right.kind import Build, Kind, Storage, both, column, part, randn, row
from shardgrad.verification.observed import Split

B, S, D, H, K = 2, 7, 12, 12, 4
"""Sequences, positions, features, heads (even over 1, 2, 3 and 4 ranks), features of a head."""


def causal(s: int, window: int | None = None) -> Tensor:
    mask = torch.ones(s, s, dtype=torch.bool).triu(1)
    return mask if window is None else mask | torch.ones(s, s, dtype=torch.bool).tril(-window)


def rotary(x: Tensor) -> Tensor:
    """x [b,h,s,k]: pairs of halves turned by position."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def alibi(s: int, first: int, heads: int) -> Tensor:
    """[h,s,s] of the heads from `first` on."""
    slopes = 2.0 ** (-8 / H * (1 + torch.arange(first, first + heads)))
    return slopes[:, None, None] * (torch.arange(s)[None, :] - torch.arange(s)[:, None])


class Attention(nn.Module):
    """Query, key, value, out; heads of a rank are its share of the query heads, and their KV heads.

    kv: KV heads; sharded where there are at least as many as ranks and they divide, else every rank holds all of them
    and picks those of its query heads, and their gradients are summed.
    """

    def __init__(
        self,
        tp: Group | None,
        kv: int = H,
        window: int | None = None,
        turn: bool = False,
        slopes: bool = False,
        fused: bool = False,
        qk_norm: bool = False,
        cap: float | None = None,
        sharp: float = 1.0,
        wide: bool = False,
    ) -> None:
        super().__init__()
        self.tp, self.kv, self.window, self.turn, self.slopes, self.fused = tp, kv, window, turn, slopes, fused
        self.cap, self.scale, self.wide = cap, sharp * K**-0.5, wide
        ranks, index = (1, 0) if tp is None else (tp.size, tp.index)
        self.heads, self.first = H // ranks, index * (H // ranks)
        self.shared = kv % ranks != 0
        self.query, self.out = column(tp, D, H * K), row(tp, H * K, D)
        if self.shared:
            self.key, self.value = column(None, D, kv * K), column(None, D, kv * K)
        else:
            self.key, self.value = column(tp, D, kv * K), column(tp, D, kv * K)
        self.query_norm = nn.RMSNorm(K, eps=1e-5) if qk_norm else None

    def forward(self, x: Tensor) -> Tensor:
        q = self._heads(self.query(x))
        k, v = self.key(x), self.value(x)
        if self.shared:
            assert self.tp is not None
            k, v = self._mine(self._heads(self.tp.copy(k))), self._mine(self._heads(self.tp.copy(v)))
        else:
            k, v = (self._heads(t).repeat_interleave(H // self.kv, 1) for t in (k, v))
        if self.query_norm is not None:
            weight = self.query_norm.weight if self.tp is None else self.tp.copy(self.query_norm.weight)
            q = F.rms_norm(q, (K,), weight, 1e-5)
        if self.turn:
            q, k = rotary(q), rotary(k)
        return self.out(self._attend(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, K)).transpose(1, 2)

    def _mine(self, x: Tensor) -> Tensor:
        """Of all KV heads, one for each of this rank's query heads."""
        return x[:, torch.arange(self.first, self.first + self.heads) // (H // self.kv)]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        s = q.shape[-2]
        scores = q @ k.transpose(-1, -2) * self.scale
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        if self.slopes:
            scores = scores + alibi(s, self.first, self.heads).to(scores)
        scores = scores.masked_fill(causal(s, self.window), float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(v) if self.wide else scores.softmax(-1)
        return weights @ v


def _attention(**given: Any) -> Any:
    return both(lambda tp: Attention(tp, **given), [randn(B, S, D)])


def thirds(tp: Group | None) -> Storage:
    """Of [q | k | v] one below the other: a rank's rows of each."""
    return 0 if tp is None else lambda w: torch.cat([part(third, 0, tp) for third in w.chunk(3)])


class _OneMatrix(nn.Module):
    """q, k and v of one product, [q | k | v] or for each head its own three."""

    def __init__(self, tp: Group | None, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.qkv = column(tp, D, 3 * H * K, how=0 if interleaved else thirds(tp))
        self.out = row(tp, H * K, D)

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(x)
        if self.interleaved:
            q, k, v = made.unflatten(-1, (-1, 3, K)).unbind(-2)
        else:
            q, k, v = (t.unflatten(-1, (-1, K)) for t in made.chunk(3, -1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


_QKV = {
    "qkv.weight": Split.of([("tp",), ()], stride=3),
    "qkv.bias": Split.of([("tp",)], stride=3),
    "qkv": Split.of([(), (), ("tp",)], stride=3),
}


class _Cross(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.query, self.key, self.value = (column(tp, D, H * K) for _ in range(3))
        self.out = row(tp, H * K, D)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            layer(t).unflatten(-1, (-1, K)).transpose(1, 2)
            for layer, t in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Context(nn.Module):
    """Positions are sharded: every rank has its queries, and gathers all keys and values. All weights are replicas,
    whose gradients are summed. Result: this rank's positions, [s/tp,d]."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp = tp
        self.query, self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(4))
        if tp is not None:
            for parameter in self.parameters():
                parameter.register_hook(tp.sum)

    def forward(self, x: Tensor) -> Tensor:
        first, s = 0, len(x)
        if self.tp is not None:
            x = self.tp.slice_rows(x)
            first = self.tp.index * len(x)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.tp is not None:
            k, v = self.tp.gather_rows(k), self.tp.gather_rows(v)
        mask = torch.arange(s)[None, :] > torch.arange(first, first + len(x))[:, None]
        return x + self.out((q @ k.T * D**-0.5).masked_fill(mask, float("-inf")).softmax(-1) @ v)


class _Ulysses(nn.Module):
    """Positions are sharded outside of attention and heads inside, by two all-to-alls. Result: [s/tp,d]."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp = tp
        self.query, self.key, self.value = (nn.Linear(D, H * K) for _ in range(3))
        self.out = nn.Linear(H * K, D)
        if tp is not None:
            for parameter in self.parameters():
                parameter.register_hook(tp.sum)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.tp is None else self.tp.slice_rows(x)
        q, k, v = (self._to_heads(layer(x)) for layer in (self.query, self.key, self.value))
        q, k, v = (t.unflatten(-1, (-1, K)).transpose(0, 1) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        return x + self.out(self._to_rows(y))

    def _to_heads(self, x: Tensor) -> Tensor:
        if self.tp is None:
            return x
        return move(self._columns, self._rows)(x)

    def _to_rows(self, x: Tensor) -> Tensor:
        if self.tp is None:
            return x
        return move(self._rows, self._columns)(x)

    def _columns(self, x: Tensor) -> Tensor:
        """This rank's columns of all rows, from its rows."""
        assert self.tp is not None
        return self.tp.cat(x).chunk(self.tp.size, 1)[self.tp.index]

    def _rows(self, x: Tensor) -> Tensor:
        assert self.tp is not None
        return self.tp.slice(torch.cat(self.tp.cat(x).chunk(self.tp.size), 1))


def _block(turn: bool) -> Build:
    class Block(nn.Module):
        def __init__(self, tp: Group | None) -> None:
            super().__init__()
            self.norm1, self.attend = nn.LayerNorm(D), Attention(tp, turn=turn)
            self.norm2, self.up, self.down = nn.LayerNorm(D), column(tp, D, 24), row(tp, 24, D)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attend(self.norm1(x))
            return x + self.down(F.relu(self.up(self.norm2(x))))

    return Block


KINDS = [
    Kind("attention", _attention()),
    Kind("attention of torch", _attention(fused=True)),
    Kind("attention, softmax in float32", _attention(wide=True)),
    Kind("attention, rotary", _attention(turn=True)),
    Kind("attention, ALiBi", _attention(slopes=True)),
    Kind("attention, sliding window", _attention(window=3)),
    Kind("attention, scores capped", _attention(cap=2.0)),
    Kind("attention, sharp", _attention(sharp=30.0)),
    Kind("attention, norms of heads", _attention(qk_norm=True)),
    Kind("grouped queries", _attention(kv=12 // 2, turn=True)),
    Kind("one KV head, on all ranks", _attention(kv=1)),
    Kind("two KV heads, on more ranks", _attention(kv=2, fused=True)),
    Kind("three KV heads, on any ranks", _attention(kv=3)),
    Kind("[q | k | v] in one matrix", both(lambda tp: _OneMatrix(tp, False), [randn(B, S, D)], splits=_QKV)),
    Kind("q, k, v of each head in one matrix", both(lambda tp: _OneMatrix(tp, True), [randn(B, S, D)])),
    Kind("cross attention", both(_Cross, [randn(B, S, D), randn(B, 5, D, seed=6)])),
    Kind("positions sharded, keys gathered", both(_Context, [randn(12, D)])),
    Kind("positions to heads by all-to-all", both(_Ulysses, [randn(12, D)])),
    Kind("block, ReLU", both(_block(False), [randn(B, S, D)])),
    Kind("block, rotary", both(_block(True), [randn(B, S, D)])),
]
