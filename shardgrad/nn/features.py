"""Which features a rank has, where several letters are one dim of an activation, or of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from shardgrad.layout.notation import Dim
from shardgrad.layout.sizes import slab
from shardgrad.nn.heads import Heads


@dataclass(frozen=True)
class Part:
    """Letters that are one dim, or one of the parts of a concatenation.

    sizes: the global size of each letter.
    queries: of KV heads `g` that stand once for each query head of the rank: how many query heads there are.
    spread: whether a rank that has none of a letter has one, of zeros.
    """

    letters: tuple[Dim, ...]
    sizes: tuple[int, ...]
    queries: int | None = None
    spread: bool = False

    @property
    def size(self) -> int:
        return prod(self.sizes)

    def indices(self, mesh_shape: Mapping[str, int], coordinate: Mapping[str, int]) -> Tensor:
        """As of `MergedDim`."""
        each = [self._of(dim, size, mesh_shape, coordinate) for dim, size in zip(self.letters, self.sizes)]
        if self.spread and any(not len(one) for one in each):
            return torch.full((prod(max(len(one), 1) for one in each),), -1)
        flat = torch.zeros(1, dtype=torch.long)
        for one, size in zip(each, self.sizes):
            flat = (flat[:, None] * size + one).flatten()
        return flat

    def _of(self, dim: Dim, size: int, mesh_shape: Mapping[str, int], coordinate: Mapping[str, int]) -> Tensor:
        if dim.letter == "g" and self.queries is not None:
            (axis,) = dim.axes
            heads = Heads.of(self.queries, size, mesh_shape[axis], coordinate[axis])
            first = torch.arange(heads.first_kv, heads.first_kv + heads.count_kv)
            return first.repeat_interleave(torch.tensor(heads.shares, dtype=torch.long))
        start, length = slab(size, dim.axes, mesh_shape, coordinate)
        return torch.arange(start, start + length)

    def __str__(self) -> str:
        return ",".join(map(str, self.letters))


@dataclass(frozen=True)
class MergedDim:
    """One dim of a tensor: its letters, or those of parts that follow one another."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that shard a letter of it."""
        return tuple(dict.fromkeys(axis for part in self.parts for dim in part.letters for axis in dim.axes))

    @property
    def once(self) -> bool:
        """Whether every element stands for one of the whole, and no two on different ranks of the axes for the same."""
        return not any(part.spread or part.queries is not None for part in self.parts)

    def indices(self, mesh_shape: Mapping[str, int], coordinate: Mapping[str, int]) -> Tensor:
        """Which of the whole dim's indices the rank at `coordinate` has, in order; -1 for what stands for none."""
        found, first = [], 0
        for part in self.parts:
            at = part.indices(mesh_shape, coordinate)
            found.append(torch.where(at < 0, at, at + first))
            first += part.size
        return torch.cat(found)

    def __str__(self) -> str:
        text = " + ".join(map(str, self.parts))
        return text if len(self.parts) == 1 and len(self.parts[0].letters) == 1 else f"({text})"


@dataclass(frozen=True)
class StoredOutput:
    """How what a layer returns is stored: its features, the last dim; and the axes that shard the sequence, dim 1."""

    features: MergedDim
    sequence: tuple[str, ...] = ()
