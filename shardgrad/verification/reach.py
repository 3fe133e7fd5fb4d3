"""What a sharded sum may come out as: the roundings between the ranks' accumulators and the result, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardgrad.verification.intervals import DIGITS, added, hull, rounded


class Bias(NamedTuple):
    """A bias of the product's shape, which its dtype holds, and the partial sums with it as one more of their terms."""

    value: Tensor
    inside: Sequence[Tensor]


def reach(
    partial: Sequence[Tensor],
    bias: Bias | None,
    dtype: torch.dtype,
    wire: torch.dtype | None,
    left: bool,
    all_rounded: bool,
) -> Tensor:
    """The interval of the result, of those of partial sums in the accumulator before the last rounding there.

    A partial sum is rounded to `dtype` as it leaves the accumulator. Partial sums of several ranks are then cast to
    `wire` and added, in any order, each sum rounded to `wire`, or some held in float32 (shared memory does it, and
    NVLink's switches); the result is cast back. The bias is added last, or as one more term of a partial sum that
    nothing reduces.

    Args:
        wire: the dtype in which partial sums are reduced; None if none are.
        left: some, or all, of the sum is left to the caller, who may add in `dtype`, or in more digits and not round.
        all_rounded: without, each rounding but the last may have been left out.
    """
    narrow = DIGITS[dtype] < DIGITS[torch.float32]
    once = [rounded(term, dtype) for term in partial]
    if wire is None and not left and len(partial) == 1:
        if bias is None:
            return once[0]
        fused = rounded(bias.inside[0], dtype)
        return hull([fused, rounded(_plus(once[0], bias.value), dtype)]) if narrow else fused
    terms = once
    if wire is not None:
        sent = [rounded(term, wire) for term in once]
        terms = sent if all_rounded and not left else [hull(pair) for pair in zip(once, sent)]
    if left and bias is not None:  # one rank adds it, perhaps inside of its product
        terms = [hull(both) for both in zip(terms, partial, _without(bias))]
        terms.append(_ends(bias.value))
    elif not all_rounded:
        terms = [hull(both) for both in zip(terms, partial)]
    ways = {dtype if wire is None else wire}
    ways |= {dtype} if left or not all_rounded else set()
    ways |= {torch.float32} if any(DIGITS[way] < DIGITS[torch.float32] for way in ways) else set()
    result = added(terms, sorted(ways, key=DIGITS.__getitem__))
    if left:
        return _eased(hull([result, *(rounded(result, way) for way in ways)]))
    last = rounded(result if wire is None else rounded(result, wire), dtype)
    if not all_rounded:
        last = hull([last, rounded(result, dtype)])
    if bias is None:
        return last
    found = rounded(_plus(last, bias.value), dtype)
    return found if all_rounded else hull([found, rounded(_plus(result, bias.value), dtype)])


def _ends(value: Tensor) -> Tensor:
    return torch.stack((value, -value))[None]


def _plus(ends: Tensor, value: Tensor) -> Tensor:
    return ends + _ends(value)


def _without(bias: Bias) -> list[Tensor]:
    """Partial sums with the errors that they have where the bias was one of their terms, less the bias."""
    return [_plus(ends, -bias.value) for ends in bias.inside]


def _eased(ends: Tensor) -> Tensor:
    """With the roundings of the float64 in which the caller adds."""
    return ends - ends.abs() * 2.0**-48
