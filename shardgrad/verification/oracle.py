"""The right result and its magnitude |X||W|, on one device, with a bound on the oracle's own error."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import frexp, inf, ldexp, prod
from typing import NamedTuple

import torch
from torch import Tensor

from shardgrad.ops.contract import Contraction

Letters = tuple[str, ...]
_U = 2.0**-53


class Right(NamedTuple):
    """value: the sum; magnitude: the sum of absolute values; error: of the value, at most. All float64, one shape.

    terms: how many are summed.
    """

    value: Tensor
    magnitude: Tensor
    error: Tensor
    terms: int = 0


def contract(left: Tensor, right: Tensor, letters: tuple[Letters, Letters, Letters], terms: int) -> Right:
    """Σ left · right over the letters that the result lacks, of which there are `terms` terms.

    Operands of up to fp32 are multiplied exactly by float64, and the additions' error is bounded. Operands of float64
    are summed in twice its precision (Dot2 of Ogita, Rump and Oishi 2005).
    """
    ls, rs, out = letters
    a, b = left.double(), right.double()
    magnitude = Contraction(ls, rs, out)(a.abs(), b.abs())
    if torch.float64 not in (left.dtype, right.dtype):
        return Right(Contraction(ls, rs, out)(a, b), magnitude, _gamma(terms) * magnitude, terms)
    value = _twice(_aligned(a, ls, out, rs), _aligned(b, rs, out, ls), terms)
    return Right(value, magnitude, _U * value.abs() + _gamma(terms) ** 2 * magnitude, terms)


def ones(dy: Tensor, letters: Letters, out: Letters) -> tuple[Tensor, Letters]:
    """What makes of a sum over dY's letters a product: ones, with the letters that the result lacks."""
    rest = tuple(x for x in letters if x not in out)
    return dy.new_ones([dy.shape[letters.index(x)] for x in rest]), rest


def parts(
    left: Tensor,
    right: Tensor,
    letters: tuple[Letters, Letters, Letters],
    blocks: Mapping[str, Sequence[tuple[int, int]]],
) -> list[Right]:
    """The partial sums of the parts into which ranks shard the letters that are summed over."""
    ls, rs, _ = letters
    found = []
    for parts in itertools.product(*blocks.values()):
        x, y = left, right
        for letter, (start, length) in zip(blocks, parts):
            x = x.narrow(ls.index(letter), start, length) if letter in ls else x
            y = y.narrow(rs.index(letter), start, length) if letter in rs else y
        found.append(contract(x, y, letters, prod(length for _, length in parts)))
    return found


def total(terms: Sequence[Right]) -> Right:
    """Their sum, in twice the precision."""
    value, magnitude, error = terms[0].value, terms[0].magnitude, terms[0].error
    low = torch.zeros_like(value)
    for term in terms[1:]:
        value, carried = two_sum(value, term.value)
        low, magnitude, error = low + carried, magnitude + term.magnitude, error + term.error
    if len(terms) > 1:
        value, error = value + low, error + _U * (value.abs() + 2 * len(terms) * low.abs())
    return Right(value, magnitude, error, sum(term.terms for term in terms))


def step(x: Tensor) -> float:
    """What every element is a multiple of: the spacing of the dtype's numbers at the smallest that is not zero."""
    least = float(torch.where(x == 0, inf, x.abs()).amin()) if x.numel() else inf
    return ldexp(torch.finfo(x.dtype).eps, frexp(least)[1] - 1) if 0 < least < inf else least


def _gamma(n: int) -> float:
    n += 2
    return n * _U / (1 - n * _U)


def _aligned(x: Tensor, letters: Letters, out: Letters, other: Letters) -> Tensor:
    """[…out letters, terms], with 1 where a letter is missing."""
    rest = [letter for letter in dict.fromkeys((*letters, *other)) if letter not in out]
    order = [letter for letter in (*out, *sorted(rest)) if letter in letters]
    x = x.permute([letters.index(letter) for letter in order])
    for at, letter in enumerate((*out, *sorted(rest))):
        if letter not in letters:
            x = x.unsqueeze(at)
    return x.flatten(len(out)) if x.dim() > len(out) else x.unsqueeze(-1)


def _twice(a: Tensor, b: Tensor, terms: int) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    total = a.new_zeros(a.shape[:-1])
    low = torch.zeros_like(total)
    for at in range(terms):
        high, error = _product(a[..., at], b[..., at])
        total, carried = two_sum(total, high)
        low = low + (carried + error)
    return total + low


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b and its error, exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a · b and its error, exactly (Dekker, Veltkamp)."""
    p = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    return p, al * bl - (((p - ah * bh) - al * bh) - ah * bl)


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    c = 134217729.0 * a  # 2^27 + 1
    high = c - (c - a)
    return high, a - high
