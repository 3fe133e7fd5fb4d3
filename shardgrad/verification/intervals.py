"""Intervals that follow a number through its roundings: the least and the greatest value that it may come out as.

Rounding to nearest is monotone: of all numbers from a to b none is rounded to less than a is, none to more than b is.
So the ends of an interval are rounded like numbers, and nothing is lost. Intervals are a tensor [bounds, 2, …] of lower
ends, of the numbers and of their negatives: ends[:, 0] <= v and ends[:, 1] <= -v, for each of several bounds.

They are float64, or float32 where all that happens to them is rounded to float32 or less: the sum of two such numbers,
rounded to float32 and then to 16 bits, is rounded as if at once (Figueroa 1995: 24 digits are enough for 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import expm1, log1p

import torch
from torch import Tensor

DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Digits of the significand, the implicit one included; the unit roundoff is 2^-digits."""
_ALL_ORDERS = 6  # numbers whose sums are followed through all orders: (3^6 - 2^7 + 1) / 2 additions
_CHUNK = 2**16  # elements at a time: every set of numbers has a sum to be held


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: the largest relative error of one rounding to nearest."""
    return 2.0 ** -DIGITS[dtype]


def interval(value: Tensor, errors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """value ± error, for each of the errors, as numbers of float64 or float32."""
    ends = value.new_empty((len(errors), 2, *value.shape), dtype=dtype)
    for (low, high), error in zip(ends, errors):
        torch.sub(value, error, out=low)
        torch.add(value, error, out=high).neg_()
    return ends


def rounded(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """After a rounding to nearest. What is rounded to 16 bits is a number of float32 before.

    Numbers below the smallest normal one may be taken for zero (AVX-512's bf16 dot product does it, measured on EPYC),
    but not float16's, which underflow gradually. An end is a float64, so a rounding to float64 leaves it where it is.
    """
    found = ends
    if dtype != torch.float64:
        found = ends.float() if dtype == torch.float32 else ends.float().to(dtype)
        found = found.to(ends.dtype)
    if dtype == torch.float16:
        return found
    return torch.where(ends < torch.finfo(dtype).smallest_normal, found.clamp(max=0), found)


def hull(intervals: Sequence[Tensor]) -> Tensor:
    """All that is in one of them, or between, for as many bounds as the one with most has."""
    return reduce(torch.minimum, intervals)


def added(terms: Sequence[Tensor], inner: Sequence[torch.dtype]) -> Tensor:
    """The sum of numbers in any order, before its last rounding; each addition before the last is rounded to one of
    the `inner` dtypes, or not.

    Of up to six numbers all orders are followed, over their sets: the least sum of a set is that of the least sums of
    two parts of it, as rounding is monotone. Of more, p - 2 additions of the largest relative error are allowed, each
    of no more than all positive numbers, or all negative ones, together.
    """
    if len(terms) > _ALL_ORDERS:
        return _bounded_sum(terms, inner)
    shape = torch.broadcast_shapes(*(term.shape for term in terms))
    flat = [term.expand(shape).reshape(-1) for term in terms]
    chunks = [_all_orders(chunk, inner) for chunk in zip(*(term.split(_CHUNK) for term in flat))]
    return torch.cat(chunks).view(shape)


def _all_orders(terms: Sequence[Tensor], inner: Sequence[torch.dtype]) -> Tensor:
    every = (1 << len(terms)) - 1
    sums = {1 << at: term for at, term in enumerate(terms)}
    for some in range(1, every + 1):
        if some in sums:
            continue
        low, total = some & -some, None
        part = (some - 1) & some  # the parts that hold the first number, each split once
        while part:
            if part & low:
                found = sums[part] + sums[some ^ part]
                total = found if total is None else torch.minimum(total, found)
            part = (part - 1) & some
        assert total is not None
        sums[some] = total if some == every else hull([total, *(rounded(total, dtype) for dtype in inner)])
    return sums[every]


def _bounded_sum(terms: Sequence[Tensor], inner: Sequence[torch.dtype]) -> Tensor:
    terms = [term.double() for term in terms]
    times, u = len(terms) - 2, max(unit(dtype) for dtype in inner)
    tops = [-term for term in terms]  # v <= tops[:, 1], -v <= tops[:, 0]
    magnitude = reduce(torch.add, (top.amax(1, keepdim=True) for top in tops))
    one_sign = reduce(torch.add, (top.clamp(min=0) for top in tops)).amax(1, keepdim=True)
    error = expm1(times * log1p(u)) * magnitude
    if times * u < 1:
        error = torch.minimum(error, times * u / (1 - times * u) * one_sign)
    flushed = times * max(torch.finfo(dtype).smallest_normal for dtype in inner if dtype != torch.float16)
    own = len(terms) * 2.0**-53 * magnitude  # of the float64 additions here
    return reduce(torch.add, terms) - error * (1 + 2.0**-48) - own - flushed
