"""How much one result of a sharded product may be rounded: which roundings there are, and of what size.

Each rounding multiplies by 1 + δ with |δ| <= u, the dtype's unit roundoff, so n of them change a term by at most
(1 + u)^n - 1 of it: Higham's γ_n, without its condition nu < 1. Derived in docs/bounds.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, expm1, inf, log1p, prod, sqrt

import torch

from shardgrad.layout.layout import Layout
from shardgrad.layout.plan import Move

# Digits of the significand, the implicit one included; the unit roundoff is 2^-digits.
DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
TF32_DIGITS = 11
MADE = ("Y", "dX", "dW", "db")


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: the largest relative error of one rounding to nearest."""
    return 2.0 ** -DIGITS[dtype]


def least(dtype: torch.dtype) -> float:
    """The largest absolute error of one rounding of a number too small for the relative one.

    fp16 has gradual underflow: its smallest subnormal. Hardware may take subnormal numbers of the wider dtypes for
    zeros (AVX-512's bf16 dot product does, measured on EPYC): their smallest normal number.
    """
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal


@dataclass(frozen=True, slots=True)
class Local:
    """How the hardware computes a local product or sum of one dtype.

    accumulate: unit of the additions inside a product; each_term: roundings of a term for each term added.
    operand: unit to which operands are rounded before they are multiplied, 0 where they are taken as they are.
    spilled: one more rounding to the dtype for so many terms, where partial sums leave the accumulator; 0 for none.
    """

    accumulate: float
    each_term: int = 1
    operand: float = 0.0
    spilled: int = 0


def local(dtype: torch.dtype, device: str = "cpu") -> Local:
    """What torch's matrix product does with this dtype on this kind of device, under the flags that are set now.

    CPU: 16-bit operands are multiplied and added in fp32, in any order, fused or not. CUDA: the same on tensor cores,
    whose additions may truncate, and align the terms of a block before adding them (Fasi et al. 2021): twice the unit,
    twice for each term. Where torch lets 16-bit sums be split and the parts be added in 16 bit
    (`allow_bf16_reduced_precision_reduction`), a part has at least 16 terms. Lower precision for fp32 operands
    (TF32, bf16) is read from torch.backends.
    """
    wide = torch.float32 if DIGITS[dtype] < 24 else dtype
    lowered = {"tf32": 2.0**-TF32_DIGITS, "bf16": 2.0 ** -DIGITS[torch.bfloat16]}
    if device == "cuda":
        flags = torch.backends.cuda.matmul
        operand = lowered.get(flags.fp32_precision, 0.0) if dtype == torch.float32 else 0.0
        if dtype == torch.float64 or (dtype == torch.float32 and not operand):
            return Local(unit(dtype))
        reduced = {
            torch.bfloat16: flags.allow_bf16_reduced_precision_reduction,
            torch.float16: flags.allow_fp16_reduced_precision_reduction,
        }.get(dtype, False)
        accumulates_narrow = dtype == torch.float16 and getattr(flags, "allow_fp16_accumulation", False)
        return Local(unit(dtype if accumulates_narrow else wide) * 2, 2, operand, 16 if reduced else 0)
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(mkldnn, "fp32_precision", "none")
    return Local(unit(wide), operand=lowered.get(precision, 0.0) if dtype == torch.float32 else 0.0)


@dataclass(slots=True)
class Roundings:
    """The roundings that a term of a sum may go through, and the absolute errors that they may add."""

    log: float = 0.0
    squares: float = 0.0
    absolute: float = 0.0

    def add(self, u: float, times: int = 1) -> None:
        self.log += times * log1p(u)
        self.squares += times * u * u

    def relative(self, lam: float | None = None) -> float:
        """Π (1 + u) - 1; with `lam`, what it exceeds with a probability of at most 2 exp(-lam² (1 - u)² / 2) for each
        term if errors are independent with mean zero (Higham and Mary 2019, theorem 2.4)."""
        certain = _expm1(self.log)
        return certain if lam is None else min(certain, _expm1(lam * sqrt(self.squares) + 2 * self.squares))

    def grown(self) -> float:
        """By how much an absolute error may grow on its way through all of the roundings."""
        return exp(min(self.log, 700.0))


def _expm1(x: float) -> float:
    return inf if x > 700 else expm1(x)


@dataclass(frozen=True, slots=True)
class Computed:
    """What there is to round in one tensor.

    terms: of a local product or sum, on the rank that has the most; all_terms: of the whole sum.
    reduced: additions over ranks, for each axis reduced by the plan; left: the same for axes left to the caller.
    product: whether terms are products (of two operands), not elements of dY.
    """

    terms: int
    all_terms: int
    reduced: tuple[int, ...]
    left: tuple[int, ...]
    product: bool = True

    def roundings(self, dtype: torch.dtype, reduce_dtype: torch.dtype | None, device: str) -> Roundings:
        """Of the sum, before a bias is added."""
        how, total = local(dtype, device), Roundings()
        ranks = prod(additions + 1 for additions in (*self.reduced, *self.left))
        if self.product:
            total.add(how.operand, 2)
            total.add(how.accumulate, how.each_term * self.terms)
            if how.spilled:
                _round(total, dtype, ranks, -(-self.terms // how.spilled))
        else:
            total.add(unit(torch.float32) if DIGITS[dtype] < 24 else unit(dtype), self.terms)
        if DIGITS[dtype] < 24:
            _round(total, dtype, ranks)
        wire = dtype if reduce_dtype is None else reduce_dtype
        if any(self.reduced):
            _cast(total, dtype, wire, ranks)
            total.add(unit(wire), sum(self.reduced))
            _cast(total, wire, dtype, ranks)
        total.add(unit(dtype), sum(self.left))
        return total


def _round(total: Roundings, dtype: torch.dtype, ranks: int, times: int = 1) -> None:
    """Every rank's partial sum is rounded to the dtype, so many times."""
    total.add(unit(dtype), times)
    total.absolute += ranks * times * least(dtype)


def _cast(total: Roundings, source: torch.dtype, target: torch.dtype, ranks: int) -> None:
    kept = DIGITS[target] >= DIGITS[source] and least(target) <= least(source)
    if source != target and not kept:
        _round(total, target, ranks)


def computed(layout: Layout, made: str, sizes: Mapping[str, int], mesh_shape: Mapping[str, int]) -> Computed:
    """What is summed where, for `made` (Y, dX, dW or db) of a layout; of two ways to sum db, the one with more roundings.

    Raises:
        ValueError: made is none of these.
        LayoutError: a letter or an axis is missing.
    """
    known = layout.resolve(sizes, mesh_shape)  # the first rank has the largest shards
    plan, product = layout.plan, layout.product
    if made == "db":
        summed = [letter for letter in product.letters if letter not in layout.bias.letters]
        left = layout.bias.grad_partial
        ways = [(product, plan.bias_grad), (layout.reading.used(product), plan.bias_grad_gathered)]
        counts = []
        for dy, moves in ways:
            shares = prod(known.shape_of([dim for dim in dy.dims if dim.letter in summed]))
            counts.append(Computed(shares, prod(sizes[x] for x in summed), *_over(moves, left, mesh_shape), False))
        return max(counts, key=lambda way: (sum(way.reduced), way.terms))
    roles = {
        "Y": (layout.product, layout.first, plan.reduce["product"], layout.product.partial),
        "dX": (layout.first, layout.second, plan.reduce["first"], layout.first.grad_partial),
        "dW": (layout.second, layout.first, plan.reduce["second"], layout.second.grad_partial),
    }
    if made not in roles:
        raise ValueError(f"made is one of {', '.join(MADE)}, not {made!r}")
    target, operand, moves, left = roles[made]
    dims = [dim for dim in layout.reading.used(operand).dims if dim.letter not in target.letters]
    whole = prod(sizes[dim.letter] for dim in dims)
    return Computed(prod(known.shape_of(dims)), whole, *_over(moves, left, mesh_shape))


def _over(
    moves: Sequence[Move], left: Sequence[str], mesh_shape: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    reducing = [move.axis for move in moves if move.kind in ("reduce-scatter", "all-reduce")]
    return tuple(mesh_shape[axis] - 1 for axis in reducing), tuple(mesh_shape[axis] - 1 for axis in left)
