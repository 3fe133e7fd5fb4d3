"""Parameters that every rank holds whole and uses differently: their gradients, summed over an axis in one go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.adjoint import replicate
from shardgrad.comm.mesh import view
from shardgrad.layout import cost


def replicate_together(parameters: Sequence[Tensor], mesh: DeviceMesh, axis: str) -> list[Tensor]:
    """`replicate` of several tensors of one dtype, whose gradients are summed in a single all-reduce.

    Tensors that need no gradient pass as they are, and are not reduced.
    """
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if len(trained) < 2:
        return [replicate(p, mesh, axis) if trained and p is trained[0] else p for p in parameters]
    flat = replicate(torch.cat([p.reshape(-1) for p in trained]), mesh, axis)
    parts = iter(flat.split([p.numel() for p in trained]))
    return [next(parts).view(p.shape) if p.requires_grad else p for p in parameters]


def summed_together(
    name: str, parameters: Sequence[Tensor], mesh: DeviceMesh, axis: str, dtype: Any
) -> list[cost.Collective]:
    """The all-reduce that `replicate_together` does in backward, every parameter trained."""
    over = view(mesh).axis(axis)
    elements = sum(p.numel() for p in parameters)
    if over.size == 1 or elements == 0:
        return []
    count = cost.sent("all-reduce", elements, over.size, over.index)
    return [cost.Collective("dW", "all-reduce", name, axis, count * cost.itemsize(dtype))]
