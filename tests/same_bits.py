"""Compare bits over meshes of the first ranks of a world, of different shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm import pieces
from shardgrad.layout.tree import Span

Whole = Mapping[str, Tensor]
"""Global tensors, alike on every rank, by their names."""


def digest(tensor: Tensor) -> str:
    assert bool(tensor.isfinite().all())
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]}"


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
        mine = {name: digest(tensor) for name, tensor in compute(mesh).items()} if rank < count else None
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
