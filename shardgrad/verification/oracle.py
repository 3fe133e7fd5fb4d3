"""The right result and its magnitude |X||W|, on one device, with a bound on the oracle's own error."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardgrad.ops.contract import Contraction

Letters = tuple[str, ...]
_U = 2.0**-53


class Right(NamedTuple):
    """value: the sum; magnitude: the sum of absolute values; error: of the value, at most. All float64, one shape."""

    value: Tensor
    magnitude: Tensor
    error: Tensor


def contract(left: Tensor, right: Tensor, letters: tuple[Letters, Letters, Letters], terms: int) -> Right:
    """Σ left · right over the letters that the result lacks, of which there are `terms` terms.

    Operands of up to fp32 are multiplied exactly by float64, and the additions' error is bounded. Operands of float64
    are summed in twice its precision (Dot2 of Ogita, Rump and Oishi 2005).
    """
    ls, rs, out = letters
    a, b = left.double(), right.double()
    magnitude = Contraction(ls, rs, out)(a.abs(), b.abs())
    if torch.float64 not in (left.dtype, right.dtype):
        return Right(Contraction(ls, rs, out)(a, b), magnitude, _gamma(terms) * magnitude)
    value = _twice(_aligned(a, ls, out, rs), _aligned(b, rs, out, ls), terms)
    return Right(value, magnitude, _U * value.abs() + _gamma(terms) ** 2 * magnitude)


def ones(dy: Tensor, letters: Letters, out: Letters) -> tuple[Tensor, Letters]:
    """What makes of a sum over dY's letters a product: ones, with the letters that the result lacks."""
    rest = tuple(x for x in letters if x not in out)
    return dy.new_ones([dy.shape[letters.index(x)] for x in rest]), rest


def parts(
    left: Tensor,
    right: Tensor,
    letters: tuple[Letters, Letters, Letters],
    blocks: Mapping[str, Sequence[tuple[int, int]]],
) -> Tensor:
    """Σ |partial sum|, over the parts into which ranks shard the letters that are summed over; not rounded down."""
    ls, rs, out = letters
    a, b, product = left.double(), right.double(), Contraction(ls, rs, out)
    total: Tensor | None = None
    for parts in itertools.product(*blocks.values()):
        x, y = a, b
        for letter, (start, length) in zip(blocks, parts):
            x = x.narrow(ls.index(letter), start, length) if letter in ls else x
            y = y.narrow(rs.index(letter), start, length) if letter in rs else y
        part = product(x, y).abs()
        total = part if total is None else total + part
    assert total is not None
    return total


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
