"""A 64-bit fingerprint of a tensor's bits, computed where the tensor lies."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

_ROW = 1024  # words summed with one set of weights; then the rows' sums are summed with weights of their own
_ROWS = {"cpu": 256}  # rows at a time: what stays in a CPU's cache
_ROWS_ELSEWHERE = 4096


def fingerprint(x: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device: equal bits, dtype and shape give equal numbers, whatever the strides.

    The bits, as 32-bit integers v, are summed with odd pseudo-random 64-bit weights that differ from place to place,
    modulo 2^64: Σ_i a_i Σ_j b_j v_ij. One changed word always changes the sum (an odd weight has an inverse); several,
    and exchanged ones, but for a chance of about 2^-63, at worst 2^-31 (sign bits alone). NaN is bits like any other.
    It guards against accidents, not against an adversary.
    """
    what = hashlib.blake2b(f"{x.dtype} {tuple(x.shape)}".encode(), digest_size=8).digest()
    total = torch.tensor(int.from_bytes(what, "big", signed=True), device=x.device)
    bits = x.detach().contiguous().view(-1).view(torch.uint8)
    if bits.storage_offset() % 4:
        bits = bits.clone()
    words = bits[: len(bits) // 4 * 4].view(torch.int32)
    rest = bits[len(words) * 4 :]
    whole = len(words) // _ROW
    if whole:
        rows, weights = words[: whole * _ROW].view(whole, _ROW), _weights(_ROW, 1, x.device)
        sums = torch.empty(whole, dtype=torch.int64, device=x.device)
        step = _ROWS.get(x.device.type, _ROWS_ELSEWHERE)
        work = torch.empty((min(step, whole), _ROW), dtype=torch.int64, device=x.device)
        for at in range(0, whole, step):
            part = rows[at : at + step]
            torch.mul(part, weights, out=work[: len(part)])
            torch.sum(work[: len(part)], 1, out=sums[at : at + step])
        total = total + (sums * _weights(whole, 2, x.device)).sum()
    last = words[whole * _ROW :]
    if len(last):
        total = total + (last * _weights(_ROW, 3, x.device)[: len(last)]).sum()
    if len(rest):
        total = total + (rest * _weights(4, 4, x.device)[: len(rest)]).sum()
    return total


@lru_cache(maxsize=64)
def _weights(count: int, kind: int, device: torch.device) -> Tensor:
    """Odd numbers of 64 bits, alike on every rank; torch's own generator is left alone."""
    generator = torch.Generator().manual_seed(kind)
    return (torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) | 1).to(device)
