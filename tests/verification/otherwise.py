"""A small decoder on one device, and what a program would be told whose ranks compute it otherwise; no ranks needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.verification.diagnose import Diagnosis, diagnose
from shardgrad.verification.functions import Change
from shardgrad.verification.hypothesis import Context
from shardgrad.verification.observed import Observed, Split
from shardgrad.verification.record import Key, forward_backward
from shardgrad.verification.reruns import Reruns, forward

MESH, AT = {"tp": 2}, ({"tp": 0}, {"tp": 1})
EPS = torch.finfo(torch.float32).eps
ROWS, SEQ, D, HEADS, KV, VOCAB = 4, 8, 16, 4, 2, 12


class Attend(nn.Module):
    """Rotary positions from tables, KV heads that are expanded, scores that are capped."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(2 * SEQ)[:, None] * 10.0 ** -torch.arange(2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.start, self.cap = 0, 5.0
        self.keys: Callable[[Tensor], Tensor] = self.shared
        self.mask: Callable[[Tensor], Tensor] = lambda scores: scores.masked_fill(
            torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1), float("-inf")
        )

    def turned(self, x: Tensor) -> Tensor:
        cos, sin = (t[self.start : self.start + SEQ] for t in (self.cos, self.sin))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    @staticmethod
    def shared(x: Tensor) -> Tensor:
        b, heads, s, d = x.shape
        return x[:, :, None].expand(b, heads, HEADS // KV, s, d).reshape(b, HEADS, s, d)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, D // HEADS)).transpose(1, 2) for t in (q, k, v))
        scores = self.turned(q) @ self.keys(k).transpose(2, 3) / 2.0
        scores = self.mask((scores / self.cap).tanh() * self.cap)
        return (scores.softmax(-1) @ self.keys(v)).transpose(1, 2).flatten(2)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(VOCAB, D), nn.Parameter(torch.randn(2 * SEQ, D) / 2)
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-3), nn.RMSNorm(D, eps=1e-3)
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D // 2), nn.Linear(D, D // 2)
        self.attend, self.up, self.act, self.down = Attend(), nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D)
        self.first = 0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.place[self.first : self.first + ids.shape[1]]
        h = self.norm1(x)
        x = x + self.attend(self.query(h), self.key(h), self.value(h))
        return x + self.down(self.act(self.up(self.norm2(x))))


def _loss(model: nn.Module, *batch: Any) -> Any:
    return model(*batch)


def _gradient(result: Tensor) -> Tensor:
    return torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)


def told(plant: Callable[[Decoder, int], None], *kinds: str) -> tuple[Diagnosis, ...]:
    """What is said of two ranks that have the decoder whole, with something planted into that of each rank; `kinds` of
    tensors are compared, by default all."""
    torch.manual_seed(0)
    single, batch = Decoder(), (torch.randint(0, VOCAB, (ROWS, SEQ)),)
    kept = copy.deepcopy(single)

    def run(model: nn.Module, whole: bool) -> Mapping[Key, Tensor]:
        if not whole:
            return forward(model, batch, _loss)
        return forward_backward(model, batch, _loss, dict(model.named_parameters()), _gradient).tensors

    def step(change: Change, parameters: Mapping[str, Tensor], in_backward: bool, whole: bool) -> Mapping[Key, Tensor]:
        model = copy.deepcopy(kept).double()
        with torch.no_grad():
            for name, value in parameters.items():
                model.get_parameter(name).copy_(value)
        with change.around(model):
            return run(model, whole)

    exact = dict(run(copy.deepcopy(kept).double(), True))
    exact = {key: tensor for key, tensor in exact.items() if not kinds or key[0] in kinds}
    ranks = []
    for rank in range(len(AT)):
        model = copy.deepcopy(kept)
        plant(model, rank)
        ranks.append(run(model, True))
    whole = {key: Split.of([()] * tensor.dim()) for key, tensor in exact.items()}
    found = []
    for key, tensor in exact.items():
        scale = torch.full_like(tensor, 4 * EPS * float(tensor.square().mean().sqrt()) + 1e-30)
        one = Observed(key[1], key[0], tuple(r.get(key) for r in ranks), tensor, whole[key], MESH, AT, scale)
        held = one.locals
        if not all(t is not None and one.agrees(rank, t, 20) for rank, t in enumerate(held)):
            found.append(one)
    reruns = Reruns(step, {key: (key, tuple(tensor.shape)) for key, tensor in exact.items()})
    known = Context(
        exact={key: (tensor, whole[key]) for key, tensor in exact.items()},
        before={n: (p.detach().double(), Split.of([()] * p.dim())) for n, p in kept.named_parameters()},
        again=reruns.again, under=reruns.under, watch=reruns.watch,
    )  # fmt: skip
    return diagnose(found, known)


def quick(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()


def tiled(x: Tensor) -> Tensor:
    return x.repeat(1, HEADS // KV, 1, 1)


def ahead(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones(SEQ, SEQ, dtype=torch.bool).triu(2), float("-inf"))


def outside(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-3) * weight + bias


def gelu_of_half(x: Tensor) -> Tensor:
    return F.gelu(x / 2) * 2
