"""How a parameter is stored: which part of a global tensor a rank has, and how it is taken, read and reassembled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.mesh import view
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.sizes import slab
from shardgrad.nn.features import MergedDim, Part
from shardgrad.ops.shard import shard, unshard


@dataclass(frozen=True, slots=True, repr=False)
class ParamSharding:
    """How a parameter is stored: which axes shard which of its dims, on which mesh, and its global shape.

    spec, shape: its letters, each with its axes, and their global sizes.
    merged: the parameter's global shape where several letters are one dim of it (the heads and their features in the
        rows of a weight); None where it is `shape`. The local parameter has as many dims.
    parts, dim: of a concatenation along a dim whose parts are sharded one by one (query, key and value in one weight):
        the parts in order. spec and shape are then those of the whole, its dims as letters.
    varies: letters with an axis that shards them for some numbers of its ranks, and not for others.
    """

    spec: TensorSpec
    shape: tuple[int, ...]
    mesh: DeviceMesh
    merged: tuple[int, ...] | None = None
    parts: tuple[ParamSharding, ...] = ()
    dim: int = 0
    varies: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("spec", "shape")}
        more = "".join(f", {name}={value!r}" for name, value in given.items() if value not in (None, (), 0))
        return f"ParamSharding({self.spec}, {self.shape}{more})"

    def __deepcopy__(self, memo: object) -> ParamSharding:
        return self  # a mesh holds process groups, which cannot be copied

    def block(self) -> tuple[list[int], list[int]]:
        """Where this rank's part begins in the global tensor, and its shape, in letters. (Of a concatenation, ask its
        parts.)"""
        mesh_view = view(self.mesh)
        slabs = [
            slab(size, dim.axes, mesh_view.shape, mesh_view.coordinate) for dim, size in zip(self.spec.dims, self.shape)
        ]
        return [start for start, _ in slabs], [length for _, length in slabs]

    @property
    def sizes(self) -> dict[str, int]:
        """The global size of each letter."""
        return {dim.letter: size for dim, size in zip(self.spec.dims, self.shape)}

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape that the whole parameter has, as one device would hold it."""
        return self.shape if self.merged is None else self.merged

    @property
    def leaves(self) -> tuple[ParamSharding, ...]:
        """The parts that are no concatenations themselves, in order; of any other parameter, this alone."""
        return tuple(leaf for part in self.parts for leaf in part.leaves) or (self,)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's parameter."""
        if self.parts:
            shapes = [part.local_shape for part in self.parts]
            return *shapes[0][: self.dim], sum(shape[self.dim] for shape in shapes), *shapes[0][self.dim + 1 :]
        lengths = self.block()[1]
        return tuple(prod(lengths[first:last]) for first, last in self._groups())

    def pieces(self, local: Tensor) -> list[tuple[Tensor, ParamSharding]]:
        """The parts of a local parameter, or of its gradient, each in letters and with how it is stored."""
        if self.parts:
            lengths = [part.local_shape[self.dim] for part in self.parts]
            pieces = zip(local.split(lengths, self.dim), self.parts)
            return [one for piece, part in pieces for one in part.pieces(piece)]
        return [(local if self.merged is None else local.reshape(self.block()[1]), self)]

    def shard(self, full: Tensor) -> Tensor:
        """This rank's part of a global tensor, of its own memory. No communication."""
        if self.parts:
            lengths = [part.global_shape[self.dim] for part in self.parts]
            pieces = zip(full.detach().split(lengths, self.dim), self.parts)
            return torch.cat([part.shard(piece) for piece, part in pieces], self.dim)
        return shard(full.reshape(self.shape), self.spec, self.mesh).reshape(self.local_shape)

    def unshard(self, local: Tensor) -> Tensor:
        """The global tensor, on every rank; called on every rank."""
        made = [unshard(piece, part.spec, part.mesh, part.sizes) for piece, part in self.pieces(local.detach())]
        whole = [one.reshape(part.global_shape) for one, part in zip(made, self.parts or (self,))]
        return torch.cat(whole, self.dim) if self.parts else whole[0]

    def read(self, slices: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
        """This rank's part of a global tensor that lies somewhere else, of which only that part is asked for. Where one
        slice is enough, the result is what `slices` returned, or a view of it.

        Args:
            slices: gives the tensor at one slice for each dim of it, as safetensors' `get_slice(name)[…]`.
        """
        if self.parts:
            made, first = [], 0
            for part in self.parts:
                made.append(part.read(_shifted(slices, self.dim, first)))
                first += part.global_shape[self.dim]
            return _joined(made, self.dim)
        starts, lengths = self.block()
        runs = [list(_runs(self.shape[a:b], starts[a:b], lengths[a:b])) for a, b in self._groups()]

        def along(dim: int, at: tuple[slice, ...]) -> Tensor:
            if dim == len(runs):
                return slices(at)
            return _joined([along(dim + 1, (*at, run)) for run in runs[dim]], dim)

        return along(0, ()).reshape(self.local_shape)

    def merged_dims(self) -> list[MergedDim]:
        """For each dim of the parameter, which letters are in it, and of which parts it consists."""
        if not self.parts:
            letters = list(zip(self.spec.dims, self.shape))
            dims, sizes = zip(*letters) if letters else ((), ())
            return [MergedDim((Part(dims[a:b], sizes[a:b]),)) for a, b in self._groups()]
        made = [part.merged_dims() for part in self.parts]
        whole = list(made[0])
        whole[self.dim] = MergedDim(tuple(one for dims in made for one in dims[self.dim].parts))
        return whole

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Of each dim of the parameter, its first letter and the one after its last."""
        at = 0
        for place, size in enumerate(self.global_shape):
            first = at
            at += 1
            last = place == len(self.global_shape) - 1
            while at < len(self.shape) and (last or prod(self.shape[first:at]) != size):
                at += 1
            yield first, at


def _runs(shape: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> Iterator[slice]:
    """A block of some letters, in the dim that they are merged to: the longest slices that it consists of."""
    whole = len(shape)  # from here on, the block has all of each letter
    while whole > 1 and lengths[whole - 1] == shape[whole - 1]:
        whole -= 1
    inside = prod(shape[whole:])
    outer = [range(start, start + length) for start, length in zip(starts[: whole - 1], lengths)]
    if not lengths[whole - 1] or not all(outer):
        yield slice(0, 0)
        return
    for index in product(*outer):
        first = 0
        for at, size in zip((*index, starts[whole - 1]), shape):
            first = first * size + at
        yield slice(first * inside, (first + lengths[whole - 1]) * inside)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _shifted(slices: Callable[[tuple[slice, ...]], Tensor], dim: int, by: int) -> Callable[..., Tensor]:
    def shifted(at: tuple[slice, ...]) -> Tensor:
        moved = slice(at[dim].start + by, at[dim].stop + by)
        return slices((*at[:dim], moved, *at[dim + 1 :]))

    return shifted
