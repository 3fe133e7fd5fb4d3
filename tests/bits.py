"""Several meshes in one world, over which exact mode gives the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.comm import pieces
from shardgrad.layout.tree import Span, TreeSum

Grid = tuple[int, ...]
Digests = dict[str, str]
Whole = Mapping[str, Tensor]
"""Global tensors, alike on every rank, by their names."""


class Meshes:
    """Every mesh of the first so many ranks of the world whose axes divide their pieces, exact mode set on each.

    pieces: V of every axis. largest_only: leave out all but one rank and those that use the whole world.
    """

    def __init__(self, pieces: Mapping[str, int], *, largest_only: bool = False) -> None:
        world = dist.get_world_size()
        ways = product(*([p for p in range(1, world + 1) if count % p == 0] for count in pieces.values()))
        grids = [grid for grid in ways if prod(grid) <= world]
        if largest_only:
            grids = [grid for grid in grids if prod(grid) in (1, world)]
        assert len(grids) > 1
        assert any(prod(grid) == world for grid in grids)
        self.pieces = dict(pieces)
        self.grids = grids
        self._all = {
            grid: DeviceMesh("cpu", torch.arange(prod(grid)).view(grid), mesh_dim_names=tuple(pieces)) for grid in grids
        }
        self.found: dict[str, dict[Grid, Digests]] = {}
        for mesh in self.mine.values():
            sg.set_exact(mesh, self.pieces)

    @property
    def mine(self) -> dict[Grid, DeviceMesh]:
        """Those that this rank is in."""
        return {grid: mesh for grid, mesh in self._all.items() if dist.get_rank() < prod(grid)}

    def run(self, what: str, compute: Callable[[DeviceMesh], Mapping[str, Tensor]]) -> Mapping[Grid, Digests]:
        """Compute the same on each mesh, or be refused; returns what this rank found.

        compute: returns global tensors.
        """
        found: dict[Grid, Digests] = {}
        for grid, mesh in self.mine.items():
            try:
                found[grid] = {name: digest(value) for name, value in compute(mesh).items()}
                assert found[grid]
            except (sg.LayoutError, sg.ShapeError) as error:
                found[grid] = {"refused": type(error).__name__, "why": str(error).partition("\n")[0]}
        assert what not in self.found, f"{what} twice"
        self.found[what] = found
        return found

    def differing(self) -> dict[str, str]:
        """What had other bits on some mesh, on any of its ranks; exchanged, and alike on all ranks."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.found)
        found: dict[str, str] = {}
        for what, by_grid in everyone[0].items():
            first = _compared(next(iter(by_grid.values())))
            assert set(by_grid) == set(self.grids)
            for rank, theirs in enumerate(everyone):
                for grid, digests in theirs[what].items():
                    names = {name for name in first | digests if first.get(name) != _compared(digests).get(name)}
                    names -= {"why"}
                    if names and what not in found:
                        found[what] = f"{', '.join(sorted(names))} on {grid}, rank {rank}: {digests.get('why', '')}"
        return found

    def refused(self) -> dict[str, str]:
        """What was refused, and why, on one rank."""
        first = {what: next(iter(by_grid.values())) for what, by_grid in self.found.items()}
        return {what: digests["why"] for what, digests in first.items() if "refused" in digests}

    def assert_same(self, *, refused: int = 0) -> None:
        """All bits are equal on all meshes, and so much is refused, on all alike."""
        found = self.differing()
        assert not found, found
        if dist.get_rank() == 0:
            assert len(self.refused()) == refused, self.refused()


def _compared(digests: Digests) -> Digests:
    return {name: value for name, value in digests.items() if name != "why"}


def digest(x: Tensor) -> str:
    """Of shape, dtype and bits."""
    flat = x.detach().contiguous().view(-1).view(torch.uint8)
    return f"{x.dtype} {tuple(x.shape)} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]}"


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, alike on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def odd(seed: int) -> int:
    """A small odd number: pieces of odd sizes."""
    return (3, 1, 5, 7)[seed % 4]


class LeftToRight(TreeSum[Tensor]):
    """What comes, added in its order."""

    def push(self, span: Span, value: Tensor) -> None:
        if self.held:
            before, other = self.held.pop()
            span, value = (before[0], span[1]), self.add(other, value)
        self.held.append((span, value))


def _digests(whole: Whole) -> Digests:
    assert all(bool(tensor.isfinite().all()) for tensor in whole.values())
    return {name: digest(tensor) for name, tensor in whole.items()}


def differing(
    axes: Sequence[str], shapes: Sequence[Sequence[int]], compute: Callable[[DeviceMesh], Whole]
) -> dict[tuple[int, ...], list[str]]:
    """The names of the tensors whose bits, on any rank, are not those of the first mesh, for each mesh that has any.

    shapes: of the meshes; the first of them of one rank.
    """
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    expected: list[Any] = [None]
    found = {}
    for shape in shapes:
        count = prod(shape)
        mesh = DeviceMesh("cpu", torch.arange(count).view(tuple(shape)), mesh_dim_names=tuple(axes))
        mine = _digests(compute(mesh)) if rank < count else None
        if expected[0] is None:
            assert count == 1
            expected = [mine]
            dist.broadcast_object_list(expected)
            continue
        wrong = [] if mine is None else [name for name in expected[0] if mine[name] != expected[0][name]]
        every: list[Any] = [None] * world
        dist.all_gather_object(every, wrong)
        if any(every):
            found[tuple(shape)] = sorted(set().union(*every))
    return found


def from_the_left() -> AbstractContextManager[Any]:
    """Sums of pieces from the first to the last, not in the tree; a rank's own first."""

    def add_up(values: Sequence[Tensor], spans: Sequence[Span], count: int, add: Callable[..., Tensor]) -> list[Tensor]:
        first, *rest = values
        for value in rest:
            first = add(first, value)
        return [first]

    return mock.patch.object(pieces, "tree_sum", add_up)
