"""Gradients whose sum over an axis layers left to the caller (`W[m,d]{dp}`): summed once, after the last backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from shardgrad.arguments import told
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import Axis, view
from shardgrad.errors import LayoutError
from shardgrad.layout.cost import Collective, sent
from shardgrad.nn.dtensors import group_ranks, is_dtensor, local
from shardgrad.nn.sharding import ParamSharding
from shardgrad.nn.shardings import named_shardings

BUCKET = 1 << 24
"""Elements reduced together: enough that latency does not count, and a copy of them is small beside a model."""


@told
@torch.no_grad()
def all_reduce_partial_grads_(model: nn.Module) -> None:
    """Sum, in place, the gradients that are partial: those of parameters that their layers store with a mark.

    For gradient accumulation: any number of backwards add up locally, then one call, on every rank of the marked axes,
    reduces the sum. Calling it twice for the same gradients would multiply them. Gradients of parameters without a mark
    are left alone, and so are axes over which `fully_shard` has summed. A parameter that has none on this rank counts
    as zeros, and has one afterwards: on another rank it may have got one. Frozen parameters have none.

    One all-reduce for each axis and some 16 million elements.

    Raises:
        TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
        CollectiveError: a collective failed or timed out.
    """
    for axis, bucket in _buckets(model):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [local(parameter.grad) for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        whole = AllReduce(axis, "all-reduce of gradients left to the caller")(flat)
        for grad, part in zip(grads, whole.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


def all_reduce_partial_grads_collectives(model: nn.Module) -> list[Collective]:
    """Every collective of `all_reduce_partial_grads_`, with its bytes."""
    found = []
    for axis, bucket in _buckets(model):
        elements = sum(local(parameter).numel() for parameter in bucket)
        count = sent("all-reduce", elements, axis.size, axis.index) * bucket[0].element_size()
        found.append(Collective("reduce", "all-reduce", "gradients left partial", axis.name, count))
    return found


def _buckets(model: nn.Module) -> Iterator[tuple[Axis, list[nn.Parameter]]]:
    """Parameters that are marked with an axis and have one dtype and device, in the model's order, with the axis to sum
    over."""
    groups: dict[object, tuple[Axis, list[nn.Parameter]]] = {}
    for name, parameter, sharding in named_shardings(model):
        if sharding is not None and parameter.requires_grad and local(parameter).numel():
            for axis in _marked(name, parameter, sharding):
                groups.setdefault((axis, parameter.dtype, parameter.device), (axis, []))[1].append(parameter)
    for axis, parameters in groups.values():
        bucket: list[nn.Parameter] = []
        for parameter in parameters:
            if bucket and sum(local(p).numel() for p in bucket) + local(parameter).numel() > BUCKET:
                yield axis, bucket
                bucket = []
            bucket.append(parameter)
        yield axis, bucket


def _marked(name: str, parameter: nn.Parameter, sharding: ParamSharding) -> list[Axis]:
    """The axes over which the gradient is partial; not those over which `fully_shard` sums it."""
    summed = [set(ranks) for ranks in group_ranks(parameter)] if is_dtensor(parameter) else []
    axes = [[view(leaf.mesh).axis(axis) for axis in leaf.spec.grad_partial] for leaf in sharding.leaves]
    if any(part != axes[0] for part in axes):
        specs = ", ".join(str(leaf.spec) for leaf in sharding.leaves)
        raise LayoutError(f"{name} concatenates parts whose gradients are left partial over different axes: {specs}")
    return [axis for axis in axes[0] if axis.size > 1 and set(axis.ranks) not in summed]
