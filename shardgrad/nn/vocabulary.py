"""How logits over a sharded vocabulary are stored, and what is read from them."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.mesh import Axis
from shardgrad.errors import ShapeError
from shardgrad.layout.sizes import chunk, rule

NO_ID = -(2**62)
"""In the place of an id: none."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Logits [..., size / ranks] over an axis, read as z = soft_cap · tanh(logits / soft_cap) / temperature."""

    size: int
    over: Axis
    temperature: float = 1.0
    soft_cap: float | None = None

    @property
    def part(self) -> tuple[int, int]:
        """Start and length of this rank's part."""
        return chunk(self.size, self.over.size, self.over.index)

    def read(self, logits: Tensor) -> Tensor:
        """z in float32 for 16-bit logits; the logits themselves where that is what they are. Differentiable."""
        z = logits.float() if logits.element_size() < 4 else logits
        if self.soft_cap is not None:
            z = (z / self.soft_cap).tanh() * self.soft_cap
        return z if self.temperature == 1 else z / self.temperature

    def pull_back(self, dz: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the logits for that of z, which is overwritten."""
        if self.temperature != 1:
            dz.div_(self.temperature)
        if self.soft_cap is not None:
            wide = logits.float() if logits.element_size() < 4 else logits
            dz.mul_((wide / self.soft_cap).tanh_().square_().neg_().add_(1))
        return dz.to(logits.dtype)

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where in this rank's part ids lie, 0 for those of others, and which are its own."""
        start, here = self.part
        local = ids.long() - start
        mine = (local >= 0) & (local < here) & (ids >= 0)
        return local.masked_fill(~mine, 0), mine

    def check(self, logits: Tensor) -> None:
        """Raise where logits are not stored so.

        Raises:
            ShapeError: they are whole already, or do not fit the vocabulary.
        """
        if logits.dim() == 0 or not logits.is_floating_point():
            raise ShapeError(
                f"logits must be floating point of shape [..., vocab], got {logits.dtype} {tuple(logits.shape)}"
            )
        here = self.part[1]
        if logits.shape[-1] != here:
            hint = (
                ": these logits are whole already (gathered?); pass each rank's own part, or use torch's own functions"
                if logits.shape[-1] == self.size
                else ""
            )
            raise ShapeError(
                f"logits have {logits.shape[-1]} columns, but a vocabulary of {self.size} over {self.over} leaves rank "
                f"{self.over.index} of them {here} ({rule(self.over.size)}){hint}"
            )

    def check_ids(self, ids: Tensor) -> None:
        """Raise where ids are neither of the vocabulary nor `NO_ID`; on the CPU, where looking costs no wait.

        Raises:
            IndexError: they are not.
        """
        if ids.device.type == "cpu" and not shim.is_fake(ids):
            wrong = (ids != NO_ID) & ((ids < 0) | (ids >= self.size))
            if bool(wrong.any()):
                raise IndexError(
                    f"id {int(ids[wrong][0])} is outside the vocabulary of {self.size} (0 to {self.size - 1})"
                )


def check_reading(temperature: float, soft_cap: float | None) -> None:
    """Raise where logits cannot be read so.

    Raises:
        ValueError: temperature or soft_cap is not a positive number.
    """
    for name, number in (("temperature", temperature), ("soft_cap", soft_cap)):
        if number is not None and not (number > 0 and isfinite(number)):
            raise ValueError(f"{name} must be a positive number, not {number} (argmax() takes the likeliest token)")


def masked(ids: Tensor, ignore_index: int) -> Tensor:
    """The ids as int64, `NO_ID` where they are to be ignored."""
    return ids.long().masked_fill(ids == ignore_index, NO_ID)


def wider(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider one's dtype."""
    dtype = torch.promote_types(z.dtype, y.dtype)
    return z.to(dtype), y.to(dtype)
