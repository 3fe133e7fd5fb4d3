"""Several meshes in one world, over which exact mode gives the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from itertools import product
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg

Grid = tuple[int, ...]
Digests = dict[str, str]


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
