"""What was seen of one tensor of a sharded model: every rank's part, the exact whole, and how it should be sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor

from shardgrad.layout.notation import Dim, TensorSpec
from shardgrad.layout.sizes import slab

Kind = Literal["output", "loss", "output gradient", "input gradient", "gradient", "norm", "step", "value"]
"""What a tensor is: a module's output, the loss, the gradient of a module's output, of the model's input, of a
parameter, the norm of all gradients before clipping, a parameter after an optimizer step, or before it."""


@dataclass(frozen=True)
class Split:
    """How a global tensor lies on a mesh.

    spec: the axes that shard each dim, and those over which the local *values* are terms of a sum (`spec.partial`).
    stride: how many interleaved parts a sharded dim consists of, each of them sharded over the axis (Megatron's
        `partition_stride`: 2 for a fused gate and up, of which every rank has a part of either).
    """

    spec: TensorSpec
    stride: int = 1

    @classmethod
    def of(cls, axes: Sequence[Sequence[str]], partial: Sequence[str] = (), stride: int = 1, name: str = "T") -> Split:
        """From the axes of each dim; letters are made up: a, b, c, …"""
        dims = tuple(Dim(chr(ord("a") + at) if at < 26 else f"a{at}", tuple(names)) for at, names in enumerate(axes))
        return cls(TensorSpec(name, dims, partial=tuple(partial)), stride)

    @property
    def partial(self) -> tuple[str, ...]:
        return self.spec.partial

    def indices(
        self, shape: Sequence[int], mesh_shape: Mapping[str, int], coordinate: Mapping[str, int]
    ) -> list[Tensor]:
        """For each dim of a global tensor of `shape`, which of its indices the rank at `coordinate` holds, in order."""
        found = []
        for size, dim in zip(shape, self.spec.dims, strict=True):
            parts = self.stride if any(mesh_shape[axis] > 1 for axis in dim.axes) else 1
            part, left = divmod(size, parts)
            if left:
                raise ValueError(f"{parts} interleaved parts do not divide {size} of {dim} in {self}")
            start, length = slab(part, dim.axes, mesh_shape, coordinate)
            found.append(torch.cat([torch.arange(start, start + length) + at * part for at in range(parts)]))
        return found

    def shard(self, full: Tensor, mesh_shape: Mapping[str, int], coordinate: Mapping[str, int]) -> Tensor:
        """The part of a global tensor that the rank at `coordinate` should hold (of a partial one: of the sum)."""
        for dim, index in enumerate(self.indices(full.shape, mesh_shape, coordinate)):
            if len(index) != full.shape[dim]:
                full = full.index_select(dim, index.to(full.device))
        return full

    def __str__(self) -> str:
        return str(self.spec) + (f" in {self.stride} interleaved parts" if self.stride > 1 else "")


@dataclass(frozen=True)
class Observed:
    """One tensor that is not what it should be, with all that there is to know about it. The same on every rank.

    name: the parameter, or the module whose output it is, as the parallel model names it.
    locals: every rank's tensor as it was, in the order of `coordinates`; None where the rank had none (no gradient).
    exact: the global tensor, float64, with the shape that the parallel model's storage has.
    split: how `exact` should lie on the ranks.
    mesh_shape: ranks along every axis of the mesh, in the mesh's order.
    coordinates: each rank's index on every axis, in the mesh's row-major order.
    scale: the size that rounding alone gives to an error of each element of `exact`; alike in shape.
    """

    name: str
    kind: Kind
    locals: tuple[Tensor | None, ...]
    exact: Tensor
    split: Split
    mesh_shape: Mapping[str, int]
    coordinates: tuple[Mapping[str, int], ...]
    scale: Tensor

    def expected(self, at: int) -> Tensor:
        """What rank `at` should hold, float64; of a partial sum: what the terms should sum to."""
        return self.split.shard(self.exact, self.mesh_shape, self.coordinates[at])

    def scale_at(self, at: int) -> Tensor:
        """The size of rounding of each element that rank `at` should hold."""
        return self.split.shard(self.scale, self.mesh_shape, self.coordinates[at])

    def agrees(self, at: int, tensor: Tensor, times: float) -> bool:
        """Whether a tensor is what rank `at` should hold, up to so many times rounding, element by element."""
        expected, scale = self.expected(at), self.scale_at(at)
        if tensor.shape != expected.shape:
            return False
        far = (tensor.detach().to(expected) - expected).abs() / scale.clamp(min=torch.finfo(torch.float64).tiny)
        return bool((far.nan_to_num(inf, inf) <= times).all())
