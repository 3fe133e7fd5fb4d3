"""What explanations are made from: a wrong tensor ready for arithmetic, and a guess of how it came about."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from shardgrad.verification.functions import Change, Watch
from shardgrad.verification.observed import Observed, Split
from shardgrad.verification.record import Key
from shardgrad.verification.rounding import Bounds, floor

_SAMPLE = 64
Named = TypeVar("Named", bound=Hashable)


@dataclass(frozen=True)
class Context:
    """What is known of the step besides the wrong tensor.

    exact: every tensor that was compared, float64, in the shape that the parallel model stores, and how it is sharded.
    before: the parameters before the step, global, by the parallel model's names; and how they are sharded.
    real: the shape of a tensor on one device, where the stored one is larger (padded).
    again: `again(key, {parameter: value}, backward)`: what one device would compute for a tensor, in float64, if
        parameters had other values, in forward and backward or in backward alone; None if it cannot be computed.
    uses: the terms of a parameter's gradient, one for each time that one device uses it, and by which function.
    under: `under(key, change)`: what one device would compute for a tensor, in float64, while something is done
        otherwise; None if that cannot be computed, or too much has been already.
    watch: the functions that one device calls, in order.
    single: one device's names, where they are others.
    wrong: the tensors that are wrong.
    earlier: of tensors that are wrong in the second step, what every rank had in the first.
    values_before: then, the global values of parameters in the first.
    draws: whether the parallel model draws random numbers, which one device does not.
    in_16_bits: whether the model itself computes in 16 bits, and was given float64, in which nothing is rounded so.
    made: changes that were made before, by their names.
    """

    exact: Mapping[Key, tuple[Tensor, Split]] = field(default_factory=dict)
    before: Mapping[str, tuple[Tensor, Split]] = field(default_factory=dict)
    real: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
    again: Callable[[Key, Mapping[str, Tensor], bool], Tensor | None] = lambda key, changes, backward: None
    uses: Callable[[str], Sequence[tuple[str, Tensor]]] = lambda name: ()
    under: Callable[[Key, Change], Tensor | None] = lambda key, change: None
    watch: Callable[[], Watch] = Watch
    single: Mapping[Key, Key] = field(default_factory=dict)
    wrong: frozenset[Key] = frozenset()
    earlier: Mapping[Key, Sequence[Tensor | None]] = field(default_factory=dict)
    values_before: Mapping[str, Tensor] = field(default_factory=dict)
    draws: bool = False
    in_16_bits: bool = False
    made: dict[Hashable, Change] = field(default_factory=dict)

    def once(self, named: Named, make: Callable[[Named], Change]) -> Change:
        """The change of a name, made the first time: steps under the same change are run once."""
        if named not in self.made:
            self.made[named] = make(named)
        return self.made[named]


class Evidence:
    """A wrong tensor whose terms, if it is a partial sum, have been added; every rank's part in float64.

    held, right, size: for each rank what it has, what it should have, and the size of rounding of each element.
    wrong: where they differ by more than rounding.
    """

    def __init__(self, found: Observed, real: tuple[int, ...] | None = None) -> None:
        self.found, self.kind, self.name = found, found.kind, found.name
        self.mesh, self.ranks = found.mesh_shape, range(len(found.coordinates))
        self.exact, self.scale, self.split = found.exact, found.scale, found.split
        terms = [torch.zeros(0) if t is None else t for t in found.locals]
        self.dtype = terms[0].dtype
        self.held = self.summed([t.double().to(found.exact.device) for t in terms], found.split.partial)
        self.right = [found.expected(r) for r in self.ranks]
        self.size = [
            torch.maximum(found.scale_at(r), floor(right, self.dtype, len(self.ranks)))
            for r, right in zip(self.ranks, self.right)
        ]
        self.allowed = Bounds.of(1, found.exact.numel()).element
        self.fits = all(a.shape == b.shape for a, b in zip(self.held, self.right))
        if self.fits and real is not None and found.kind not in ("gradient", "step", "value"):
            self._ignore_beyond(real)
        self.wrong = [
            ~((a - b).abs() <= self.allowed * s) for a, b, s in zip(self.held, self.right, self.size) if self.fits
        ]

        self.sample = [_some(wrong) for wrong in self.wrong]

    def may_be(self, wanted: Sequence[Tensor], size: Sequence[Tensor]) -> bool:
        """Whether a prediction is right at some of the elements that are wrong: a look before the thorough one."""
        for rank, at in enumerate(self.sample):
            if at is not None:
                far = (self.held[rank][at] - wanted[rank][at]).abs()
                if not bool((far <= self.allowed * size[rank][at]).all()):
                    return False
        return True

    def _ignore_beyond(self, real: tuple[int, ...]) -> None:
        """What padding holds is no concern of verification, but of gradients of parameters."""
        inside = torch.zeros(self.exact.shape, dtype=torch.bool, device=self.exact.device)
        inside[tuple(slice(size) for size in real)] = True
        for rank in self.ranks:
            mine = self.split.shard(inside, self.mesh, self.found.coordinates[rank])
            self.held[rank] = torch.where(mine, self.held[rank], self.right[rank])

    def groups(self, axes: Sequence[str]) -> Iterator[list[int]]:
        """Ranks that differ in their place on these axes alone."""
        rest = [axis for axis in self.mesh if axis not in axes]
        by_place: dict[tuple[int, ...], list[int]] = {}
        for rank, at in enumerate(self.found.coordinates):
            by_place.setdefault(tuple(at[axis] for axis in rest), []).append(rank)
        yield from by_place.values()

    def summed(self, tensors: Sequence[Tensor], axes: Sequence[str]) -> list[Tensor]:
        """Every rank gets the sum over the axes."""
        sums = list(tensors)
        for group in self.groups(axes) if axes else ():
            if len({tensors[r].shape for r in group}) == 1:
                total = torch.stack([tensors[r] for r in group]).sum(0)
                for rank in group:
                    sums[rank] = total
        return sums

    def axes(self, *, sharded: bool | None = None) -> Iterator[tuple[tuple[str, ...], int]]:
        """Every set of axes longer than 1, and its number of ranks: of those that shard the tensor, the others, or all.

        Of sets with the same number of ranks all are given, as a factor does not distinguish them.
        """
        sharding = {axis for dim in self.split.spec.dims for axis in dim.axes}
        fit = [a for a, n in self.mesh.items() if n > 1 and (sharded is None or (a in sharding) == sharded)]
        for count in range(1, len(fit) + 1):
            for axes in combinations(fit, count):
                yield axes, prod(self.mesh[axis] for axis in axes)

    def parts(self, full: Tensor) -> list[Tensor]:
        """What each rank would have of a global tensor."""
        return [self.split.shard(full, self.mesh, at) for at in self.found.coordinates]

    def whole_along(self, dim: int, rank: int) -> tuple[Tensor, Tensor]:
        """The exact tensor and rounding's size, sharded as on this rank but whole along `dim`."""
        own = self.split.indices(self.exact.shape, self.mesh, self.found.coordinates[rank])
        exact, scale = self.exact, self.scale
        for other, index in enumerate(own):
            if other != dim:
                exact, scale = exact.index_select(other, index), scale.index_select(other, index)
        return exact, scale

    def rows_of(self, rank: int, dim: int) -> Tensor:
        """The global indices along `dim` that the rank should hold."""
        return self.split.indices(self.exact.shape, self.mesh, self.found.coordinates[rank])[dim]


def _some(wrong: Tensor) -> tuple[Tensor, ...] | None:
    """The places of a few of the elements, from all over the tensor."""
    flat = wrong.reshape(-1).nonzero().flatten()
    if not len(flat) or not wrong.dim():
        return None
    return torch.unravel_index(flat[:: max(len(flat) // _SAMPLE, 1)], wrong.shape)


@dataclass(frozen=True)
class Hypothesis:
    """One explanation of one tensor, with what it predicts.

    name: the entry of the table of explanations.
    says, remedy: in the words of the user.
    wanted, size: what the explanation predicts for each rank, and what rounding does to it.
    got: what is to be compared with it: by default what every rank has; for explanations of the ranks' sum, it.
    cost: the less simple, the more.
    fitted: how many numbers of the prediction were taken from what was seen.
    reduced: axes over which a reduction is to blame, so that it is wrong on all of their ranks, or on none.
    """

    name: str
    says: str
    remedy: str
    wanted: Sequence[Tensor]
    size: Sequence[Tensor]
    got: Sequence[Tensor] | None = None
    cost: int = 0
    fitted: int = 0
    reduced: tuple[str, ...] = ()


def list_of(names: Sequence[object]) -> str:
    """a, b and c."""
    *first, last = [str(name) for name in names]
    return f"{', '.join(first)} and {last}" if first else last
