"""Parameters that every rank holds whole and uses differently: their gradients, summed over an axis in one go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.adjoint import replicate
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import Axis, axis_on, view
from shardgrad.layout import cost


def replicate_together(parameters: Sequence[Tensor], mesh: DeviceMesh, axis: str) -> list[Tensor]:
    """`replicate` of several tensors of one dtype, whose gradients are summed in a single all-reduce.

    Tensors that need no gradient pass as they are, and are not reduced.
    """
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if len(trained) < 2:
        return [replicate(p, mesh, axis) if trained and p is trained[0] else p for p in parameters]
    if torch.compiler.is_compiling():
        flat = replicate(torch.cat([p.reshape(-1) for p in trained]), mesh, axis)
        parts = iter([part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in trained]), trained)])
    else:
        over = axis_on(mesh, axis)
        if over.size == 1:
            return list(parameters)
        parts = iter(_Together.apply(over, *trained))
    return [next(parts) if p.requires_grad else p for p in parameters]


class _Together(torch.autograd.Function):
    """The tensors themselves, of which backward keeps no copy; their gradients side by side in one all-reduce."""

    @staticmethod
    def forward(ctx: Any, over: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.over = over
        return tuple([tensor.view_as(tensor) for tensor in tensors])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = AllReduce(ctx.over)(torch.cat([grad.reshape(-1) for grad in grads]))
        return None, *(part.view(g.shape) for part, g in zip(flat.split([g.numel() for g in grads]), grads))


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
