"""Explanations by a lower precision: of the tensor itself, or of the terms that were added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardgrad.verification.hypothesis import Context, Evidence, Hypothesis
from shardgrad.verification.rounding import floor

_DIGITS = {torch.float32: (24, 5), torch.float64: (53, 20)}
"""Binary digits of a dtype, and how many of the last ones a sum of a few 16-bit numbers leaves zero."""
_MOSTLY = 0.9
_REMEDY = "look for a reduction whose terms are cast to {}: sum in the precision of the tensor"
_FEW = 16
"""Elements needed, so that zeros in their last digits are no chance."""


def lower_precision(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """The numbers have fewer digits than the working precision."""
    if known.in_16_bits:
        return
    for narrow in (torch.bfloat16, torch.float16):
        narrower = seen.dtype.itemsize > narrow.itemsize and seen.fits
        if (
            narrower
            and all(torch.equal(held.to(narrow).double(), held) for held in seen.held)
            and (narrow is torch.bfloat16 or _off(seen) < _BETWEEN)
        ):
            size = _size(seen, narrow)
            says = f"every element is a {str(narrow).removeprefix('torch.')} number, and right to its digits"
            remedy = f"look for a cast, or a reduction, in {str(narrow).removeprefix('torch.')}"
            yield Hypothesis("rounded to a lower precision", says, remedy, seen.right, size, seen.held, cost=1)


_BETWEEN = 2.0**-11.7
"""Relative error, between those of numbers rounded to bfloat16 and to float16."""


def _off(seen: Evidence) -> float:
    """The error of the wrong elements, over their size."""
    pairs = [(held[wrong], right[wrong]) for held, right, wrong in zip(seen.held, seen.right, seen.wrong)]
    error = sum(float((held - right).square().sum()) for held, right in pairs)
    whole = sum(float(right.square().sum()) for _, right in pairs)
    return (error / whole) ** 0.5 if whole else 0.0


def _size(seen: Evidence, narrow: torch.dtype) -> list[Tensor]:
    eps, ranks = torch.finfo(narrow).eps, len(seen.ranks)
    return [torch.maximum(floor(right, narrow, ranks), eps * right.square().mean().sqrt()) for right in seen.right]


def rounded_terms(seen: Evidence, terms: Sequence[Tensor], rest: Tensor, narrow: torch.dtype) -> Iterator[Hypothesis]:
    """Terms that are known, rounded and added up; what is added to their sum afterwards is `rest`.

    Of a term that is not exact either, one in many is rounded to the next number: most elements must be right.
    """
    rounded = [term.to(narrow).double() for term in terms]
    total = rounded[0]
    for term in rounded[1:]:
        total = (total + term).to(narrow).double()
    what = str(narrow).removeprefix("torch.")
    for full in (sum(rounded[1:], rounded[0]), total):
        wanted = seen.parts(full + rest)
        near = [((a - b).abs() <= seen.allowed * s) for a, b, s in zip(seen.held, wanted, seen.size)]
        if sum(int(one.sum()) for one in near) < _MOSTLY * sum(one.numel() for one in near):
            continue
        size = [torch.maximum(a, b) for a, b in zip(_size(seen, narrow), seen.size)]
        says = f"it is what comes out if each rank's term is rounded to {what} before they are added up"
        yield Hypothesis(
            f"rounded to {what} in a reduction", says, _REMEDY.format(what), wanted, size, seen.held, cost=1
        )


def sums_of_lower_precision(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Terms were rounded, added up, and the sum was not: its last digits are zeros. To float32 only beside float64."""
    if known.in_16_bits:
        return
    if not seen.fits or seen.dtype not in _DIGITS or sum(int(w.sum()) for w in seen.wrong) < _FEW:
        return
    digits, zeros = _DIGITS[seen.dtype]
    ranks = [rank for rank in seen.ranks if bool(seen.wrong[rank].any())]
    held = torch.cat([seen.held[rank][seen.wrong[rank]] for rank in ranks])
    right = torch.cat([seen.right[rank][seen.wrong[rank]] for rank in ranks])
    if not bool(held.isfinite().all()) or not bool(held.all()) or not bool(right.any()):
        return
    numbers = (held.frexp().mantissa * 2.0**digits).to(torch.int64)
    if float((numbers % 2**zeros == 0).double().mean()) < 0.95:
        return
    narrow = torch.bfloat16 if _off(seen) > _BETWEEN else torch.float16
    if _off(seen) < 2.0**-18:
        narrow = torch.float32
    if narrow.itemsize >= seen.dtype.itemsize or torch.equal(held.to(narrow).double(), held):
        return  # no sum, or one that was rounded as well
    what = str(narrow).removeprefix("torch.")
    says = f"it is right to the digits of {what}, and a sum of numbers of that precision: the last digits are zeros"
    size = [torch.maximum(a, b) for a, b in zip(_size(seen, narrow), seen.size)]
    yield Hypothesis(
        f"rounded to {what} in a reduction", says, _REMEDY.format(what), seen.right, size, seen.held, cost=1
    )
