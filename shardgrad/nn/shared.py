"""Parameters that every rank holds whole and uses differently: their gradients, summed over an axis in one go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.adjoint import replicate


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
