"""Random bits of `counter`, compared with a threshold where they are made: in integers of torch, on any device.

NumPy's Philox runs on the host alone, and a copy from there waits for all that the device has been given. These are the
same numbers (Philox4x64 with ten rounds: Salmon et al. 2011, section 3.3). torch has no high half of a 64-bit product,
so it is put together from halves of 32 bits. On a CPU this takes many times as long as NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from shardgrad.nn.counter import block_of_runs

_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B  # added to the key between rounds
_ROUNDS = 10
_LOW = 2**32 - 1
_PER_COUNTER = 8  # elements that take their bits from one value of the counter
_AT_ONCE = 2**20  # values of the counter: some 130 bytes of memory for each


def below(
    threshold: int, key: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int], device: torch.device
) -> Tensor:
    """`counter.bits32(key, shape, starts, lengths) < threshold`, bool [*lengths], without a copy from the host.

    threshold: from 0 to 2³² - 1.
    """
    if 0 in lengths:
        return torch.empty(tuple(lengths), dtype=torch.bool, device=device)
    if not shape:
        return below(threshold, key, (1,), (0,), (1,), device).view(())
    strides = [prod(shape[at + 1 :]) for at in range(len(shape))]

    def effort(level: int) -> int:
        return prod(lengths[:level]) * (lengths[level] * strides[level] + 2 * _PER_COUNTER)

    # As in `counter`: runs of consecutive elements from dim `level` on, the dims inside it whole.
    level = min(range(len(shape)), key=effort)
    size = lengths[level] * strides[level]
    begins = torch.full((1,), starts[level] * strides[level], dtype=torch.int64, device=device)
    for start, length, stride in zip(starts[:level], lengths[:level], strides):
        begins = (begins.unsqueeze(-1) + _range(length, device).add_(start).mul_(stride)).flatten()
    blocks = (size + 2 * (_PER_COUNTER - 1)) // _PER_COUNTER  # of a run, wherever in one it begins
    counters = ((begins // _PER_COUNTER).unsqueeze(-1) + _range(blocks, device)).flatten()
    made = torch.cat([_below(threshold, some, key) for some in counters.split(_AT_ONCE)]).view(len(begins), -1)
    if all(length == 1 or stride % _PER_COUNTER == 0 for length, stride in zip(lengths[:level], strides)):
        first = sum(start * stride for start, stride in zip(starts[: level + 1], strides))
        whole = made.narrow(1, first % _PER_COUNTER, size)
    else:
        whole = made.gather(1, (begins % _PER_COUNTER).unsqueeze(-1) + _range(size, device))
    return block_of_runs(whole, level, shape, starts, lengths)


def _below(threshold: int, counters: Tensor, key: int) -> Tensor:
    """Of the elements of each counter, one after the other: [8 n]."""
    # torch compares signed integers: both sides less 2³¹.
    halves = numbers(counters + 1, key).view(torch.int32).flatten()  # NumPy counts from 1
    return halves.bitwise_xor_(-(2**31)) < threshold - 2**31


def numbers(counters: Tensor, key: int) -> Tensor:
    """The four numbers that Philox makes of each counter: int64 [n] → [n, 4], whose 64 bits are meant.

    key: of 128 bits.
    """
    multiplier, weyl = _column(_MULTIPLIERS, counters), _column(_WEYL, counters)
    low_of_it, high_of_it = (
        _column([m & _LOW for m in _MULTIPLIERS], counters),
        _column([m >> 32 for m in _MULTIPLIERS], counters),
    )
    keys = _column((key % 2**64, key >> 64), counters)
    # The counter's words 0 and 2, which are multiplied, and 1 and 3, which are not.
    even = torch.stack((counters, torch.zeros_like(counters)))
    odd = torch.zeros_like(even)
    for _ in range(_ROUNDS):
        low, high = even & _LOW, _high(even)
        carry = torch.addcmul(_high(low * low_of_it), high, low_of_it)
        other = torch.addcmul(carry & _LOW, low, high_of_it)
        upper = torch.addcmul(_high(carry), high, high_of_it).add_(_high(other))
        even, odd = upper.flip(0).bitwise_xor_(odd).bitwise_xor_(keys), (even * multiplier).flip(0)
        keys = keys + weyl
    return torch.stack((even[0], odd[0], even[1], odd[1]), 1)


def _high(x: Tensor) -> Tensor:
    """The upper 32 of 64 bits."""
    return (x >> 32).bitwise_and_(_LOW)


def _range(length: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device)


def _column(values: Sequence[int], like: Tensor) -> Tensor:
    """Two numbers of 64 bits, [2, 1], written by kernels: a tensor made of a list is copied from the host."""
    column = like.new_empty((2, 1))
    for row, value in zip(column.unbind(), values):
        row.fill_(value - 2**64 if value >= 2**63 else value)
    return column
