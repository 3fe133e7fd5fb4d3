"""Random bits as a function of the global element: any block of a global tensor's, without building the tensor.

Elements are counted in the row-major order of the *global* tensor and take their bits, in that order, from a Philox
stream (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; NumPy's `Philox`), which can be entered
anywhere. So every mesh shards the same global tensor of random bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PER_COUNTER = 4  # 64-bit numbers that Philox4x64 makes from one value of its counter
_PER_RUN = 1000  # numbers made in the time that entering the stream elsewhere takes (2.6 µs, measured)


def bits64(key: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> NDArray[np.uint64]:
    """64 bits for each element of the block that begins at `starts` and has `lengths`, of a tensor of `shape`."""
    return _block(key, shape, starts, lengths, 1)


def bits32(key: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> NDArray[np.uint32]:
    """32 bits for each element of a block, as `bits64`: two elements share a number of the stream."""
    return _block(key, shape, starts, lengths, 2)


def _block(key: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int], per: int) -> NDArray[Any]:
    stream = _Stream(key, per)
    if 0 in lengths:
        return np.empty(lengths, stream.kind)
    if not shape:
        return stream.take(0, 1).reshape(())
    strides = [prod(shape[at + 1 :]) for at in range(len(shape))]

    def effort(level: int) -> int:
        return prod(lengths[:level]) * (_PER_RUN + lengths[level] * strides[level])

    # Runs of consecutive elements from dim `level` on, the dims inside it whole: more than is needed where one of
    # those is sharded. Longer runs cost elements, shorter ones cost entries into the stream.
    level = min(range(len(shape)), key=effort)
    size = lengths[level] * strides[level]
    whole = np.empty((prod(lengths[:level]), size), stream.kind)
    outer = (range(start, start + length) for start, length in zip(starts[:level], lengths[:level]))
    for row, index in enumerate(product(*outer)):
        first = sum(at * stride for at, stride in zip((*index, starts[level]), strides))
        whole[row] = stream.take(first, size)
    return block_of_runs(whole, level, shape, starts, lengths)


def block_of_runs(whole: Any, level: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> Any:
    """The block out of its runs, which begin at dim `level` and hold the dims inside it whole."""
    inside = tuple(slice(start, start + length) for start, length in zip(starts[level + 1 :], lengths[level + 1 :]))
    return whole.reshape(*lengths[: level + 1], *shape[level + 1 :])[..., *inside]


class _Stream:
    """A Philox stream of elements, `per` of them to a 64-bit number."""

    def __init__(self, key: int, per: int) -> None:
        self._bits, self._per, self._counter = np.random.Philox(key=key), per, 0
        self.kind = np.dtype({1: "<u8", 2: "<u4"}[per])

    def take(self, start: int, count: int) -> NDArray[Any]:
        """Elements `start` to `start + count`."""
        elements = self._per * _PER_COUNTER
        first, end = start // elements, -(-(start + count) // elements)
        self._bits.advance((first - self._counter) % 2**256)
        self._counter = end
        raw = np.asarray(self._bits.random_raw((end - first) * _PER_COUNTER)).astype("<u8", copy=False)
        skip = start - first * elements
        return raw.view(self.kind)[skip : skip + count]
