"""Initial values as a function of the global element: the same for every mesh, without building the global tensor.

A parameter is made from the bits that `counter` gives each element of the *global* tensor. The stream's key is drawn
from torch's CPU generator, one draw a parameter whatever the mesh, so `torch.manual_seed` decides the values as it does
for torch's own layers (whose values these are not).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardgrad.nn.counter import bits64


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A stream's key, from torch's CPU generator: alike on ranks that were seeded alike."""
    return int(torch.randint(0, 2**63 - 1, (), generator=generator, dtype=torch.int64, device="cpu"))


def uniform(bound: float, seed: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The block of a global tensor of `shape`, uniform in [-bound, bound); float64, on the CPU."""
    return torch.from_numpy(_unit(seed, shape, starts, lengths)).mul_(2 * bound).sub_(bound)


def normal(std: float, seed: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The block of a global tensor of `shape`, normal with mean 0; float64, on the CPU (by the inverse of the CDF)."""
    return torch.special.ndtri(torch.from_numpy(_unit(seed, shape, starts, lengths))).mul_(std)


def _unit(seed: int, shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float64]:
    """Numbers strictly between 0 and 1, for the block that begins at `starts` and has `lengths`."""
    return np.asarray(((bits64(seed, shape, starts, lengths) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
