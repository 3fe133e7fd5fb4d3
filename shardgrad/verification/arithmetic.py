"""How far a sum on one device may be from the exact one, and what is summed where in a sharded product.

Each rounding multiplies by 1 + δ with |δ| <= u, the dtype's unit roundoff. Derived in docs/bounds.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import expm1, inf, log1p, sqrt

import torch
from torch import Tensor

from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import Dim
from shardgrad.layout.plan import Move
from shardgrad.layout.sizes import slab
from shardgrad.verification.intervals import DIGITS, unit

TF32_DIGITS = 11
MADE = ("Y", "dX", "dW", "db")


@dataclass(frozen=True, slots=True)
class Local:
    """How the hardware computes a local product or sum of one dtype.

    accumulate: unit of the additions inside; each_term: roundings for each term added, where they are not to nearest
        (0: to nearest, one for each addition).
    product: unit to which products are rounded before they are added, 0 where they are exact.
    operand: unit to which operands are rounded before they are multiplied, 0 where they are taken as they are.
    spill, spilled: unit of one more rounding for so many terms, where partial sums leave the accumulator; 0 for none.
    """

    accumulate: float
    each_term: int = 0
    product: float = 0.0
    operand: float = 0.0
    spill: float = 0.0
    spilled: int = 0

    def errors(self, terms: int, value: Tensor, magnitude: Tensor, top: float, lam: float) -> list[Tensor]:
        """How far a sum may be from its exact value before its last rounding: for certain and, where less, likely.

        Additions are in any order: each is off by at most u times its result, a sum of some of the terms, and no such
        sum exceeds what all positive terms have together, or all negative ones: (Σ|t| + |Σt|) / 2. The last rounding,
        of the last addition or of an only product, is `reach`'s. (Where additions are not to nearest all are counted.)

        Args:
            terms: how many; magnitude: Σ|t|; top: no |t| is larger.
            lam: of the likely bound, which is exceeded with a probability of at most 2 exp(-lam² / 2) if each rounding
                error has mean zero whatever those before were (Azuma's inequality; Higham and Mary 2020).

        Returns:
            Float64 tensors of the value's shape, one or two.
        """
        if not terms:
            return [torch.zeros_like(value)]
        u, times = self.accumulate, self.each_term * terms or max(terms - 2, 0)
        spills = -(-terms // self.spilled) if self.spilled else 0
        product = 0.0 if terms == 1 and not self.each_term else self.product
        each = expm1(2 * log1p(self.operand) + log1p(product))  # the relative error of one term
        once = times * u + spills * self.spill
        if once > 0.5:
            grown = times * log1p(u) + spills * log1p(self.spill) + log1p(each)
            return [_expm1(grown) * _UP * magnitude]
        sums = (magnitude + value.abs()) * ((1 + each) * _UP / 2)
        certain = once / (1 - once) * sums
        certain = certain + each * _UP * magnitude if each else certain
        variance = times * u**2 + spills * self.spill**2
        if self.each_term or lam**2 * variance >= once**2:  # what is truncated has no mean of zero
            return [certain]
        likely = lam * sqrt(variance) * _UP * (sums + certain)
        if each:
            likely = (likely.square() + (lam * each * _UP) ** 2 * magnitude * magnitude.clamp(max=top)).sqrt()
        return [certain, torch.minimum(certain, likely)]


_UP = 1 + 2.0**-40  # more than the roundings of the float64 in which bounds are computed


def _expm1(x: float) -> float:
    return inf if x > 700 else expm1(x)


def local(dtype: torch.dtype, device: str = "cpu") -> Local:
    """What torch's matrix product does with this dtype on this kind of device, under the flags that are set now.

    CPU: 16-bit operands are multiplied and added in fp32, in any order, fused or not; their products are exact in it
    (twice 8 digits, or twice 11, of 24). CUDA: the same on tensor cores, whose additions may truncate, and align the
    terms of a block before adding them (Fasi et al. 2021): twice the unit, twice for each term. Where torch lets 16-bit
    sums be split and the parts be added in 16 bit (`allow_bf16_reduced_precision_reduction`), a part has at least 16
    terms. Lower precision for fp32 operands (TF32, bf16) is read from torch.backends.
    """
    narrow = DIGITS[dtype] < DIGITS[torch.float32]
    wide = unit(torch.float32 if narrow else dtype)
    lowered = {"tf32": 2.0**-TF32_DIGITS, "bf16": unit(torch.bfloat16)}
    if device == "cuda":
        flags = torch.backends.cuda.matmul
        operand = lowered.get(flags.fp32_precision, 0.0) if dtype == torch.float32 else 0.0
        if not narrow and not operand:
            return Local(wide, product=wide)
        reduced = {
            torch.bfloat16: flags.allow_bf16_reduced_precision_reduction,
            torch.float16: flags.allow_fp16_reduced_precision_reduction,
        }.get(dtype, False)
        if dtype == torch.float16 and getattr(flags, "allow_fp16_accumulation", False):
            return Local(unit(dtype) * 2, 2, unit(dtype))
        return Local(wide * 2, 2, 0.0, operand, unit(dtype), 16 if reduced else 0)
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(mkldnn, "fp32_precision", "none")
    operand = lowered.get(precision, 0.0) if dtype == torch.float32 else 0.0
    return Local(wide, product=0.0 if narrow else wide, operand=operand)


def local_sum(dtype: torch.dtype) -> Local:
    """What torch's sum over dims does: 16 bits are added in fp32."""
    return Local(unit(torch.float32 if DIGITS[dtype] < DIGITS[torch.float32] else dtype))


@dataclass(frozen=True, slots=True)
class Computed:
    """What there is to add up in one tensor.

    reduced: additions over ranks, for each axis reduced by the plan; left: the same for axes left to the caller.
    blocks: for each letter that is summed over, where the ranks' parts begin and how long they are.
    product: whether terms are products (of two operands), not elements of dY.
    """

    reduced: tuple[int, ...]
    left: tuple[int, ...]
    blocks: Mapping[str, Sequence[tuple[int, int]]]
    product: bool = True


def computed(
    layout: Layout, made: str, sizes: Mapping[str, int], mesh_shape: Mapping[str, int]
) -> tuple[Computed, ...]:
    """What is summed where, for `made` (Y, dX, dW or db) of a layout; two for db where dY is gathered, or is not.

    Raises:
        LayoutError: a letter or an axis is missing.
    """
    layout.resolve(sizes, mesh_shape)
    plan, y, used = layout.plan, layout.out, layout.reading.compute_layout

    def of(
        dims: Sequence[Dim], target: Sequence[str], moves: Sequence[Move], left: Sequence[str], product: bool = True
    ) -> Computed:
        reducing = [move.axis for move in moves if move.kind in ("reduce-scatter", "all-reduce")]
        reduced, rest = (tuple(mesh_shape[axis] - 1 for axis in axes) for axes in (reducing, left))
        summed = [dim for dim in dims if dim.letter not in target]
        return Computed(reduced, rest, _blocks(summed, sizes, mesh_shape), product)

    if made == "db":
        # Summed from dY as stored, or as gathered for a product, whichever is at hand.
        letters, left = layout.bias.letters, layout.bias.grad_partial
        stored = of(y.dims, letters, plan.bias_grad, left, False)
        gathered = of(used(y).dims, letters, plan.bias_grad_gathered, left, False)
        return (stored, gathered) if plan.bias_can_share and gathered != stored else (stored,)
    target, operand, moves, left = {
        "Y": (y, layout.lhs, plan.reduce["out"], y.partial),
        "dX": (layout.lhs, layout.rhs, plan.reduce["lhs"], layout.lhs.grad_partial),
        "dW": (layout.rhs, layout.lhs, plan.reduce["rhs"], layout.rhs.grad_partial),
    }[made]
    return (of(used(operand).dims, target.letters, moves, left),)


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
