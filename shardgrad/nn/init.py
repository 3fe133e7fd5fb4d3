"""Initial values as a function of the global element: the same for every mesh, without building the global tensor.

Element e of a parameter, counted in the row-major order of the *global* tensor, is made from number e of a Philox
stream (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; NumPy's `Philox`), which can be entered
anywhere. The stream's key is drawn from torch's CPU generator, one draw a parameter whatever the mesh, so
`torch.manual_seed` decides the values as it does for torch's own layers (whose values these are not).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PER_COUNTER = 4  # numbers that Philox4x64 makes from one value of its counter


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A stream's key, from torch's CPU generator: alike on ranks that were seeded alike."""
    return int(torch.randint(0, 2**63 - 1, (), generator=generator, dtype=torch.int64))


def uniform(bound: float, seed: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The block of a global tensor of `shape`, uniform in [-bound, bound); float64, on the CPU."""
    return torch.from_numpy(_unit(seed, shape, starts, lengths)).mul_(2 * bound).sub_(bound)


def normal(std: float, seed: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The block of a global tensor of `shape`, normal with mean 0; float64, on the CPU (by the inverse of the CDF)."""
    return torch.special.ndtri(torch.from_numpy(_unit(seed, shape, starts, lengths))).mul_(std)


def _unit(seed: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float64]:
    """Numbers strictly between 0 and 1, for the block that begins at `starts` and has `lengths`."""
    block = np.empty(lengths, dtype=np.float64)
    if block.size == 0:
        return block
    # The trailing dims that the block has whole are one run of consecutive elements, with the dim before them.
    tail = len(shape)
    while tail > 0 and lengths[tail - 1] == shape[tail - 1]:
        tail -= 1
    outer = max(tail - 1, 0)
    inner = prod(shape[outer + 1 :])
    run = prod(lengths[outer:])
    strides = [prod(shape[at + 1 :]) for at in range(outer)]
    flat = block.reshape(-1, run)
    first = starts[outer] * inner if shape else 0
    for row, index in enumerate(product(*(range(s, s + n) for s, n in zip(starts[:outer], lengths[:outer])))):
        flat[row] = _stream(seed, first + sum(i * stride for i, stride in zip(index, strides)), run)
    return block


def _stream(seed: int, start: int, count: int) -> NDArray[np.float64]:
    bits = np.random.Philox(key=seed)
    bits.advance(start // _PER_COUNTER)
    skip = start % _PER_COUNTER
    raw: NDArray[np.uint64] = np.asarray(bits.random_raw(count + skip))[skip:]
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
