"""How much one result of a sharded product may be rounded: which roundings there are, and of what size.

Each rounding multiplies by 1 + δ with |δ| <= u, the dtype's unit roundoff, so n of them change a term by at most
(1 + u)^n - 1 of it: Higham's γ_n, without its condition nu < 1. Derived in docs/bounds.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import expm1, inf, log1p, prod, sqrt

import torch

from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import Dim
from shardgrad.layout.plan import Move
from shardgrad.layout.sizes import slab

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


def _expm1(x: float) -> float:
    return inf if x > 700 else expm1(x)


@dataclass(frozen=True, slots=True)
class Stages:
    """Where the roundings of a result happen, which says of what they are a part.

    inside: a local product or sum: of |X||W|. outside: partial sums on their way through the reduction: of the sum of
    the partial sums' absolute values. last: of the result.
    """

    inside: Roundings
    outside: Roundings
    last: Roundings


@dataclass(frozen=True, slots=True)
class Computed:
    """What there is to round in one tensor.

    terms: of a local product or sum, on the rank that has the most; all_terms: of the whole sum.
    reduced: additions over ranks, for each axis reduced by the plan; left: the same for axes left to the caller.
    blocks: for each letter that is summed over, where the ranks' parts begin and how long they are.
    product: whether terms are products (of two operands), not elements of dY.
    """

    terms: int
    all_terms: int
    reduced: tuple[int, ...]
    left: tuple[int, ...]
    blocks: Mapping[str, Sequence[tuple[int, int]]]
    product: bool = True

    def stages(self, dtype: torch.dtype, reduce_dtype: torch.dtype | None, device: str) -> Stages:
        """Of the sum, before a bias is added. Every addition of two numbers of a dtype is rounded to it once."""
        how, inside, outside, last = local(dtype, device), Roundings(), Roundings(), Roundings()
        ranks = prod(len(parts) for parts in self.blocks.values())
        narrow = DIGITS[dtype] < DIGITS[torch.float32]
        if self.product:
            inside.add(how.operand, 2)
            inside.add(how.accumulate, how.each_term * self.terms)
            if how.spilled:
                _round(inside, dtype, ranks, -(-self.terms // how.spilled))
        else:
            inside.add(unit(torch.float32) if narrow else unit(dtype), self.terms)
        if narrow:
            _round(outside, dtype, ranks)
        if any(self.reduced):
            wire = dtype if reduce_dtype is None else reduce_dtype
            _cast(outside, dtype, wire, ranks)
            outside.add(unit(wire), sum(self.reduced))
            _cast(outside if any(self.left) else last, wire, dtype, ranks)
        outside.add(unit(dtype), sum(self.left))
        return Stages(inside, outside, last)


def _round(total: Roundings, dtype: torch.dtype, ranks: int, times: int = 1) -> None:
    """Every rank's partial sum is rounded to the dtype, so many times."""
    total.add(unit(dtype), times)
    total.absolute += ranks * times * least(dtype)


def _cast(total: Roundings, source: torch.dtype, target: torch.dtype, ranks: int) -> None:
    kept = DIGITS[target] >= DIGITS[source] and least(target) <= least(source)
    if source != target and not kept:
        _round(total, target, ranks)


def computed(layout: Layout, made: str, sizes: Mapping[str, int], mesh_shape: Mapping[str, int]) -> Computed:
    """What is summed where, for `made` (Y, dX, dW or db) of a layout.

    Raises:
        LayoutError: a letter or an axis is missing.
    """
    known = layout.resolve(sizes, mesh_shape)  # the first rank has the largest shards
    plan, y, used = layout.plan, layout.out, layout.reading.compute_layout

    def whole(letters: Sequence[str]) -> int:
        return prod(sizes[letter] for letter in letters)

    if made == "db":
        # Summed from dY as stored, or as gathered for a product, whichever is at hand: no more terms on a rank than of
        # the gathered one, no more additions over ranks and no more parts than of the stored one.
        stored = [dim for dim in y.dims if dim.letter not in layout.bias.letters]
        terms = prod(known.shape_of([d for d in used(y).dims if d.letter not in layout.bias.letters]))
        reduced, left = _over(plan.bias_grad, layout.bias.grad_partial, mesh_shape)
        return Computed(
            terms, whole([d.letter for d in stored]), reduced, left, _blocks(stored, sizes, mesh_shape), False
        )
    target, operand, moves, leaves = {
        "Y": (y, layout.lhs, plan.reduce["out"], y.partial),
        "dX": (layout.lhs, layout.rhs, plan.reduce["lhs"], layout.lhs.grad_partial),
        "dW": (layout.rhs, layout.lhs, plan.reduce["rhs"], layout.rhs.grad_partial),
    }[made]
    dims = [dim for dim in used(operand).dims if dim.letter not in target.letters]
    terms = prod(known.shape_of(dims))
    reduced, left = _over(moves, leaves, mesh_shape)
    return Computed(terms, whole([dim.letter for dim in dims]), reduced, left, _blocks(dims, sizes, mesh_shape))


def _over(
    moves: Sequence[Move], left: Sequence[str], mesh_shape: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    reducing = [move.axis for move in moves if move.kind in ("reduce-scatter", "all-reduce")]
    return tuple(mesh_shape[axis] - 1 for axis in reducing), tuple(mesh_shape[axis] - 1 for axis in left)


def _blocks(
    dims: Sequence[Dim], sizes: Mapping[str, int], mesh_shape: Mapping[str, int]
) -> dict[str, list[tuple[int, int]]]:
    """For each letter, the parts that the ranks of its axes hold."""
    return {
        dim.letter: [
            slab(sizes[dim.letter], dim.axes, mesh_shape, dict(zip(dim.axes, at)))
            for at in product(*(range(mesh_shape[axis]) for axis in dim.axes))
        ]
        for dim in dims
    }
