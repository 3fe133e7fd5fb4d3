"""Rotary positions: queries and keys turned, two features at a time, by angles that grow with the position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardgrad.arguments import TellingType, told
from shardgrad.errors import ShapeError


class Rotary(nn.Module, metaclass=TellingType):
    """Feature i of a head and feature i + k/2 are a pair, turned by the angle position · base^(-2i/k).

    Pairs are half a head apart ("rotate half"), as in Llama and Hugging Face's models, not neighbours as in the paper.
    It has no parameters, mixes no heads and no positions, and so needs no communication whatever is sharded: it must be
    given where in the sequence its input stands.

    Args:
        head_dim: k, even.
        base: theta, the base of the frequencies (10000 in the paper, 500000 in Llama 3).

    Shapes: x [..., s, h, k] and positions [s] or [..., s] → as x, in its dtype. Angles are in float32 at least.

    Raises:
        ShapeError: head_dim is not even, or x is of another.
    Source: Su et al. 2021, arXiv 2104.09864.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ShapeError(f"Rotary: head_dim={head_dim} must be even and positive: features are turned in pairs")
        if not base > 0:
            raise ValueError(f"Rotary: base must be positive, not {base}")
        self.head_dim, self.base = head_dim, base

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine for each position, each [..., s, 1, k]: to turn several tensors by."""
        wide = torch.promote_types(dtype, torch.float32)
        even = torch.arange(0, self.head_dim, 2, device=positions.device).to(wide)
        angle = positions.to(wide).unsqueeze(-1) * self.base ** (-even / self.head_dim)
        angle = torch.cat((angle, angle), -1).unsqueeze(-2)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    @told
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if x.dim() < 3 or x.shape[-1] != self.head_dim:
            raise ShapeError(f"Rotary turns [..., s, h, {self.head_dim}], not {tuple(x.shape)}")
        return turn(x, *self.angles(positions, x.dtype))

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}"


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [..., s, h, k] turned by the angles of `Rotary.angles`."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine
