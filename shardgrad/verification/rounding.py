"""What rounding alone may do to a tensor: runs of one device whose sums go in other orders, and bounds that follow.

The yardstick of a tensor is how far one device, in the working precision, is from float64. One such run is one draw of
a random error, so there are several: every product and every sum over rows is done in as many blocks as there are
ranks, of elements in a random order, each block's result is rounded to the working precision, and they are added in it.
That is what a correct sharded program does, on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm import shim

FEW = 3
"""Runs of one device in the working precision that are enough for a step in which all is rounding: one as it is, the
others with their sums in other orders. Where a tensor differs by more than these allow, `RUNS` of them decide."""
RUNS = 9
SLACK = 4.0
"""How many times as large as one device's the rounding errors of a correct program may be: it fuses other operations,
and the spread is estimated from a few runs. Measured: see docs/verify.md."""
FALSE_ALARM = 1e-9
"""Probability that the error of one tensor, Gaussian and of the estimated spread, passes a bound at SLACK 1."""
_aten = torch.ops.aten


class Reordered(shim.TorchDispatchMode):
    """Inside the block, products and sums over rows are done in `blocks` blocks, in an order drawn from `seed`.

    asked: the dtypes that the program has cast to.
    """

    def __init__(self, blocks: int, seed: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.generator = torch.Generator().manual_seed(seed)
        self.asked: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule, kwargs = _RULES.get(func), kwargs or {}
        if kwargs.get("dtype") is not None:
            self.asked.add(kwargs["dtype"])
        return rule(self, func, *args, **kwargs) if rule else func(*args, **kwargs)

    def cut(self, size: int, device: torch.device) -> list[Tensor]:
        """The indices of a dim, shuffled, in blocks."""
        order = torch.randperm(size, generator=self.generator).to(device)
        return list(order.chunk(min(self.blocks, size))) if size else [order]


def _product(mode: Reordered, func: Any, x: Tensor, w: Tensor) -> Tensor:
    """[..., n, k] [..., k, m] (or [k]), in blocks of k."""
    along = -1 if w.dim() == 1 else -2
    parts = [func(x.index_select(-1, at), w.index_select(along, at)) for at in mode.cut(x.shape[-1], x.device)]
    return reduce(torch.add, parts)


def _added_product(inner: Any) -> Callable[..., Tensor]:
    def rule(mode: Reordered, func: Any, b: Tensor, x: Tensor, w: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        product = _product(mode, inner, x, w)
        return (b if beta == 1 else b * beta) + (product if alpha == 1 else product * alpha)

    return rule


def _sum(
    mode: Reordered, func: Any, x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    dims = [d % x.dim() for d in (dim or range(x.dim()))] if x.dim() else []
    if not x.is_floating_point() or not dims:
        return func(x, dim, keepdim, dtype=dtype)
    longest = max(dims, key=lambda d: x.shape[d])
    parts = [x.index_select(longest, at) for at in mode.cut(x.shape[longest], x.device)]
    return reduce(torch.add, (func(part, dim, keepdim, dtype=dtype) for part in parts))


def _sum_all(mode: Reordered, func: Any, x: Tensor, *, dtype: Any = None) -> Tensor:
    return _sum(mode, _aten.sum.dim_IntList, x, list(range(x.dim())), dtype=dtype) if x.dim() else func(x, dtype=dtype)


def _norm_backward(rows: int) -> Callable[..., Any]:
    """Backward of a norm: (dY, x, normalized shape, `rows` statistics of each row, weights…, mask)."""

    def rule(mode: Reordered, func: Any, dy: Tensor, x: Tensor, shape: Sequence[int], *rest: Any) -> Any:
        flat = [t.reshape(-1, *shape) for t in (dy, x)]
        statistics = [t.reshape(flat[0].shape[0], *[1] * len(shape)) for t in rest[:rows]]
        order = mode.cut(flat[0].shape[0], x.device)
        parts = [func(*(t[at] for t in flat), shape, *(t[at] for t in statistics), *rest[rows:]) for at in order]
        dx = None if parts[0][0] is None else torch.empty_like(flat[1])
        for at, part in zip(order, parts):
            if dx is not None:
                dx[at] = part[0]
        weights = [None if ps[0] is None else reduce(torch.add, ps) for ps in list(zip(*parts))[1:]]
        return (None if dx is None else dx.view_as(x), *weights)

    return rule


def _embedding_backward(mode: Reordered, func: Any, dy: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    by_frequency = bool(rest[-1])
    if by_frequency:
        return func(dy, ids, *rest)
    dy, ids = dy.reshape(-1, dy.shape[-1]), ids.reshape(-1)
    return reduce(torch.add, (func(dy[at], ids[at], *rest) for at in mode.cut(len(ids), ids.device)))


_RULES: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _product,
    _aten.bmm.default: _product,
    _aten.mv.default: _product,
    _aten.addmm.default: _added_product(_aten.mm.default),
    _aten.baddbmm.default: _added_product(_aten.bmm.default),
    _aten.addmv.default: _added_product(_aten.mv.default),
    _aten.sum.dim_IntList: _sum,
    _aten.sum.default: _sum_all,
    _aten.native_layer_norm_backward.default: _norm_backward(2),
    _aten.embedding_dense_backward.default: _embedding_backward,
}


class Spread:
    """Errors of one tensor in several runs of one device, summed up as they come.

    exact: the tensor in float64. squares: the sum of each element's squared errors. norms: of each run, squared.
    """

    def __init__(self, exact: Tensor, squares: Tensor | None = None, norms: Iterable[float] = ()) -> None:
        self.exact = exact
        self.squares = torch.zeros_like(exact) if squares is None else squares
        self.norms = list(norms)

    surely = 0.0
    """An error of one element that is rounding whatever the element."""
    blind = False
    """Whether it cannot say what is near zero, as one device in the working precision was not finite."""

    def add(self, run: Tensor) -> None:
        square = (run.to(self.exact) - self.exact).square_()
        self.squares += square
        self.norms.append(float(square.sum()))

    def sizes(self, floor: Tensor) -> tuple[Tensor, Tensor]:
        """The size of each element's own errors, and the size that rounding gives to it; neither is below the floor.

        Its own is their root mean square. The other is the largest of it; of what its row and its column have together
        (Rᵢ Cⱼ / S of the mean squares: an element's own few errors may all be small by chance); and an eighth of the
        tensor's.
        """
        mean = self.squares / max(len(self.norms), 1)
        own = torch.maximum(mean, floor.square())
        scale = own
        if mean.numel():
            every = mean.mean()
            if mean.dim() > 1 and every > 0:
                rows = mean.flatten(0, -2)
                together = (rows.mean(1, keepdim=True) / every) * rows.mean(0, keepdim=True)
                scale = torch.maximum(scale, together.view_as(scale))
            scale = scale.clamp(min=float(every) / 64).sqrt_()
        return own.sqrt(), scale

    @property
    def freedom(self) -> float:
        """Effective degrees of freedom of the error's squared norm, 2 mean² / variance over the runs (Satterthwaite),
        halved because few runs give the variance badly; between 1 and the number of elements.

        1 where one rounding upstream moves all elements together; many where each has errors of its own.
        """
        count = max(self.exact.numel(), 1)
        norms = torch.tensor(self.norms, dtype=torch.float64)
        variance = float(norms.var()) if len(norms) > 1 else 0.0
        if not variance > 0:
            return 1.0
        return min(max(float(norms.mean()) ** 2 / variance, 1.0), float(count))


_NOTHING = 2.0**-28
"""Beside the typical tensor of its kind, what float64 may leave by cancellation."""


class InSingle:
    """What may be left of a tensor that was computed in float64: what float32 would leave of it, and not more.

    A program that computes something in float32 whatever it is given (a table, a kernel) is right; one that is wrong
    by more is not, though bfloat16 would not show it.

    exact: the tensor in float64. spread: the errors of one device in `dtype`, of a step with other values.
    typical: the root mean square of a typical tensor of its kind in the step. What is nothing beside it, as a
        gradient that is zero but for cancellation, is float64's own rounding.
    """

    freedom = 1.0

    def __init__(
        self, exact: Tensor, spread: Spread | None, dtype: torch.dtype, ranks: int, typical: float = 0.0
    ) -> None:
        self.exact, self._spread, self._dtype, self._ranks = exact, spread, dtype, ranks
        self._unit = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
        self.surely = _NOTHING * typical
        """An error of one element that is rounding whatever the element."""

    @cached_property
    def blind(self) -> bool:
        """As of `Spread`."""
        return self._spread is not None and not bool(self._spread.squares.isfinite().all())

    def sizes(self, floor_: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Spread`, in units of float32."""
        least = floor(self.exact, torch.float32, self._ranks).clamp(min=self.surely)
        if self._spread is None:
            mean = float(least.square().mean().sqrt()) if least.numel() else 0.0
            return least, least.clamp(min=mean / 8)
        seen = self._spread.sizes(floor(self._spread.exact, self._dtype, self._ranks))
        own, scale = (torch.maximum(size.nan_to_num(0.0, 0.0, 0.0) * self._unit, least) for size in seen)
        return own, scale


def floor(exact: Tensor, dtype: torch.dtype, ranks: int) -> Tensor:
    """The least error to allow in each element: √p roundings of the element, p independent ones of relative size u.

    u is half the spacing of the working precision: storing the result is one rounding, and adding the partial sums of p
    ranks p - 1 more. The smallest normal number is added, as results below it may be flushed to zero.
    """
    if not dtype.is_floating_point:
        return torch.zeros_like(exact)
    info = torch.finfo(dtype)
    return exact.abs().nan_to_num() * (info.eps / 2 * sqrt(ranks)) + info.tiny


@dataclass(frozen=True)
class Bounds:
    """How many times rounding's size the norm of an error, and its largest element, may be.

    For ν independent Gaussians z of unit variance, P(‖z‖ > √ν + t) ≤ exp(-t²/2) (concentration of a 1-Lipschitz
    function), and P(max |zᵢ| > t) ≤ 2 n exp(-t²/2). Both times SLACK.
    """

    norm: float
    element: float

    @classmethod
    def of(cls, freedom: float, count: int) -> Bounds:
        t = sqrt(2 * log(1 / FALSE_ALARM))
        return cls(SLACK * (1 + t / sqrt(max(freedom, 1.0))), SLACK * sqrt(2 * log(2 * max(count, 1) / FALSE_ALARM)))
