"""Right programs: convolutions, recurrence, pooling, sorting, routing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.mutants.by_hand import Group, move
from shardgrad.mutants.right.kind import Kind, Stored, both, column, randn, row
from shardgrad.mutants.right.mlps import Act, Between

D, M, ROWS = 10, 24, 12


class _ConvIn(Stored):
    """Channels that go out are sharded."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tp: Group, shape: tuple[int, ...], function: Any) -> None:
        super().__init__()
        self.hold(tp, weight=(shape, 0), bias=((shape[0],), 0))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.tp.copy(x), self.weight, self.bias, padding=1)


class _ConvOut(Stored):
    """Channels that come in are sharded."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tp: Group, shape: tuple[int, ...], function: Any) -> None:
        super().__init__()
        self.hold(tp, weight=(shape, 1), bias=((shape[0],), None))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.tp.reduce(self.function(x, self.weight, padding=1))
        return y + self.bias.view(-1, *[1] * (x.dim() - 2))


class _Convs(nn.Module):
    def __init__(self, tp: Group | None, dims: int, act: Act, pool: Act = lambda y: y) -> None:
        super().__init__()
        self.act, self.pool = act, pool
        if tp is None:
            layer: Any = nn.Conv1d if dims == 1 else nn.Conv2d
            self.up, self.down = layer(3, 12, 3, padding=1), layer(12, 5, 3, padding=1)
        else:
            function = F.conv1d if dims == 1 else F.conv2d
            self.up = _ConvIn(tp, (12, 3, *[3] * dims), function)
            self.down = _ConvOut(tp, (5, 12, *[3] * dims), function)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.pool(self.act(self.up(x))))


class _Recurrent(nn.Module):
    """h ← tanh(Wx + Uh), features of h sharded: h is gathered at each step."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp, self.enter, self.again = tp, column(tp, D, 12), column(tp, 12, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 12)
        for step in x:
            own = torch.tanh(self.enter(step) + self.again(h))
            h = own if self.tp is None else _columns(self.tp, own)
        return h


def _columns(tp: Group, x: Tensor) -> Tensor:
    """All ranks' columns; its backward keeps this rank's, as the gradient is the same on all."""
    return move(tp.cat, tp.slice)(x.transpose(0, 1)).transpose(0, 1)


class _Gated(nn.Module):
    """An LSTM's four gates in one matrix for each input, in an order in which a rank has its features of all four."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp, self.enter, self.again = tp, column(tp, D, 48), column(tp, 12, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, cell = x.new_zeros(x.shape[1], 12), 0.0
        for step in x:
            made = (self.enter(step) + self.again(h)).unflatten(-1, (-1, 4))
            i, f, o, g = made.unbind(-1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            own = o.sigmoid() * torch.tanh(cell)
            h = own if self.tp is None else _columns(self.tp, own)
        return h


class _Experts(nn.Module):
    """Each token goes to its first k of 12 experts, which are sharded; a replicated router weighs them. An expert
    takes as many tokens as `capacity` says, the first ones."""

    def __init__(self, tp: Group | None, k: int = 2, capacity: int = 99, softmax_first: bool = True) -> None:
        super().__init__()
        self.tp, self.k, self.capacity, self.softmax_first = tp, k, capacity, softmax_first
        local = 12 if tp is None else 12 // tp.size
        self.first = 0 if tp is None else tp.index * local
        self.router = nn.Linear(D, 12, bias=False)
        self.up, self.down = nn.Parameter(torch.zeros(local, D, 6)), nn.Parameter(torch.zeros(local, 6, D))
        if tp is not None:
            self.storage = {"up": 0, "down": 0}

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.softmax_first:
            weights, which = logits.softmax(-1).topk(self.k, -1)
        else:
            values, which = logits.topk(self.k, -1)
            weights = values.softmax(-1)
        if self.tp is not None:
            weights, x_in = self.tp.copy(weights), self.tp.copy(x)
        else:
            x_in = x
        y = torch.zeros_like(x)
        for local, (up, down) in enumerate(zip(self.up, self.down)):
            token, choice = (which == self.first + local).nonzero(as_tuple=True)
            token, choice = token[: self.capacity], choice[: self.capacity]
            made = F.silu(x_in[token] @ up) @ down
            y = y.index_add(0, token, made * weights[token, choice, None])
        return x + (y if self.tp is None else self.tp.reduce(y))


class _SharedSoftmax(nn.Module):
    """A softmax over a sharded dim, by hand, and a product with it."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.tp, self.up, self.down = tp, column(tp, D, M), row(tp, M, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.tp is None:
            return self.down(h.softmax(-1))
        powers = (h - self.tp.max(h.detach().amax(-1, keepdim=True))).exp()
        total = move(self.tp.sum, self.tp.sum)(powers.sum(-1, keepdim=True))
        return self.down(powers / total)


def _frozen(tp: Group | None) -> nn.Module:
    """The first layer is frozen in both models."""
    model = Between(tp, F.gelu)
    model.up.requires_grad_(False)
    return model


class _Buffers(Between):
    """A running mean of what goes in, and a counter of integers."""

    mean: Tensor
    calls: Tensor

    def __init__(self, tp: Group | None) -> None:
        super().__init__(tp, F.gelu)
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0).to(self.mean), 0.1)
            self.calls.add_(1)
        return super().forward(x)


def _pairs(h: Tensor) -> Tensor:
    """Sorted in pairs, so that a rank has whole ones."""
    return h.unflatten(-1, (-1, 2)).sort(-1).values.flatten(-2)


def _scatter(h: Tensor) -> Tensor:
    index = (torch.arange(len(h)) * 5) % 7
    return torch.zeros_like(h).index_add(0, index, h)


def _between(what: Act) -> Any:
    return both(lambda tp: Between(tp, what), [randn(ROWS, D)])


def _einsum(h: Tensor) -> Tensor:
    """Every pair of rows, of each feature."""
    return torch.einsum("nf,mf->nf", h, h.tanh()) / len(h)


def _top_rows(h: Tensor) -> Tensor:
    """Of each feature the three largest rows, the rest zero."""
    values, index = h.topk(3, 0)
    return torch.zeros_like(h).scatter(0, index, values)


_IMAGE, _SIGNAL = randn(2, 3, 6, 6), randn(2, 3, 9)

KINDS = [
    Kind("convolution of signals", both(lambda tp: _Convs(tp, 1, F.silu), [_SIGNAL])),
    Kind("convolution of images", both(lambda tp: _Convs(tp, 2, F.relu), [_IMAGE])),
    Kind("maximum pooling", both(lambda tp: _Convs(tp, 2, F.silu, lambda y: F.max_pool2d(y, 2)), [_IMAGE])),
    Kind("ReLU, then maximum pooling", both(lambda tp: _Convs(tp, 2, F.relu, lambda y: F.max_pool2d(y, 2)), [_IMAGE])),
    Kind("mean pooling", both(lambda tp: _Convs(tp, 1, F.silu, lambda y: F.avg_pool1d(y, 3)), [_SIGNAL])),
    Kind("recurrence", both(_Recurrent, [randn(4, 3, D)])),
    Kind("gated recurrence", both(_Gated, [randn(4, 3, D)])),
    Kind("experts, two a token", both(_Experts, [randn(ROWS, D)])),
    Kind("experts, one a token", both(lambda tp: _Experts(tp, k=1), [randn(ROWS, D)])),
    Kind("experts of a capacity", both(lambda tp: _Experts(tp, capacity=2), [randn(48, D)])),
    Kind("experts, softmax of the chosen", both(lambda tp: _Experts(tp, softmax_first=False), [randn(48, D)])),
    Kind("softmax over sharded features", both(_SharedSoftmax, [randn(ROWS, D)])),
    Kind("sorted in pairs", _between(_pairs)),
    Kind("sorted along rows", _between(lambda h: h.sort(0).values)),
    Kind("largest rows", _between(_top_rows)),
    Kind("cumulative sums", _between(lambda h: h.cumsum(0) / 4)),
    Kind("cumulative maxima", _between(lambda h: h.cummax(0).values)),
    Kind("einsum", _between(_einsum)),
    Kind("scatter-add", _between(_scatter)),
    Kind("sign of the input times it", _between(lambda h: h * h.sign())),
    Kind("rounded to an eighth, straight through", _between(lambda h: h + ((h * 8).round() / 8 - h).detach())),
    Kind("frozen in both", both(_frozen, [randn(ROWS, D)])),
    Kind("buffers", both(_Buffers, [randn(ROWS, D)])),
]
