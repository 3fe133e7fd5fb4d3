"""What was seen of one tensor of a sharded model: every rank's part, the exact whole, and how it should be sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch
from torch import Tensor

from shardgrad.layout.notation import Dim, TensorSpec
from shardgrad.layout.sizes import slab
from shardgrad.nn.features import MergedDim

Kind = Literal[
    "output", "loss", "output gradient", "input gradient", "gradient", "norm", "step", "second step", "value", "buffer"
]
"""What a tensor is: a module's output, the loss, the gradient of a module's output, of the model's input, of a
parameter, the norm of all gradients before clipping, a parameter after an optimizer step, after a second one, or before
them, a buffer after the step."""


BACKWARD: tuple[Kind, ...] = ("output gradient", "input gradient", "gradient")


@dataclass(frozen=True)
class Split:
    """How a global tensor lies on a mesh.

    spec: the axes that shard each dim, and those over which the local *values* are terms of a sum (`spec.partial`).
    stride: how many interleaved parts a sharded dim consists of, each of them sharded over the axis (Megatron's
        `partition_stride`: 2 for a fused gate and up, of which every rank has a part of either).
    merged: dims that consist of several letters, or of parts, by their place.
    """

    spec: TensorSpec
    stride: int = 1
    merged: tuple[tuple[int, MergedDim], ...] = ()

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
        """For each dim of a global tensor of `shape`, which of its indices the rank at `coordinate` holds, in order.

        -1 stands for an element that is none of the tensor's (a rank without heads has one of zeros).
        """
        found = []
        merged = dict(self.merged)
        for at, (size, dim) in enumerate(zip(shape, self.spec.dims, strict=True)):
            if at in merged:
                if merged[at].size != size:
                    raise ValueError(f"{dim} in {self} has {merged[at].size} elements, not {size}")
                found.append(merged[at].indices(mesh_shape, coordinate))
                continue
            parts = self.stride if any(mesh_shape[axis] > 1 for axis in dim.axes) else 1
            part, left = divmod(size, parts)
            if left:
                raise ValueError(f"{parts} interleaved parts do not divide {size} of {dim} in {self}")
            start, length = slab(part, dim.axes, mesh_shape, coordinate)
            found.append(torch.cat([torch.arange(start, start + length) + i * part for i in range(parts)]))
        return found

    def shard(self, full: Tensor, mesh_shape: Mapping[str, int], coordinate: Mapping[str, int]) -> Tensor:
        """The part of a global tensor that the rank at `coordinate` should hold (of a partial one: of the sum)."""
        for dim, index in enumerate(self.indices(full.shape, mesh_shape, coordinate)):
            if len(index) != full.shape[dim] or self.merged:
                full = full.index_select(dim, index.clamp(min=0).to(full.device))
                if bool((index < 0).any()):
                    full = full.index_fill(dim, (index < 0).nonzero().flatten().to(full.device), 0)
        return full

    def summed_over(self, axes: Sequence[str]) -> Split:
        """The same, the values being terms of a sum over these axes (of none: complete)."""
        return replace(self, spec=TensorSpec(self.spec.name, self.spec.dims, partial=tuple(axes)))

    def __str__(self) -> str:
        merged = dict(self.merged)
        parts = [f"{self.stride}*" if self.stride > 1 and dim.axes else "" for dim in self.spec.dims]
        dims = ",".join(f"{count}{merged.get(at, dim)}" for at, (count, dim) in enumerate(zip(parts, self.spec.dims)))
        marks = f"{{{','.join(self.partial)}}}" if self.partial else ""
        return f"{self.spec.name}[{dims}]{marks}"


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
