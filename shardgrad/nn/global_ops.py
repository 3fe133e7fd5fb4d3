"""What is global over shards: the number of a model's parameters, and the norm of its gradients."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from math import inf, prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardgrad.comm.agree import agree
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.layout.cost import Collective, sent
from shardgrad.nn.shardings import named_shardings


def num_parameters(model: nn.Module) -> int:
    """The number of a model's parameters as one device would hold them: shards added up, replicas and shared ones
    counted once. No communication.

    Raises:
        TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
    """
    return sum(p.numel() if sharding is None else prod(sharding.shape) for _, p, sharding in named_shardings(model))


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradients in place so that their norm, over all shards, replicas counted once, is at most `max_norm`.

    torch.nn.utils.clip_grad_norm_ for a model of shards: (Σ|g|^p)^(1/p) over the global gradients, each of which is
    then multiplied by min(1, max_norm / (norm + 1e-6)). One all-reduce of a few numbers for each axis that shards a
    parameter, whether or not this rank has gradients; called on every rank of those axes. Layers may be on several
    meshes. Gradients must be complete: a sum left to the caller (`W[d,m]{dp}`) comes first.

    Args:
        model: a module, or the part of one whose gradients are meant. Parameters without gradient count as zeros.
        max_norm: the largest norm, alike on every rank; math.inf only measures.
        norm_type: p, a positive number, or math.inf for the largest absolute value.
        error_if_nonfinite: whether to raise, on every rank, instead of scaling by a norm that is inf or NaN.

    Returns:
        The norm before scaling, a scalar alike on every rank (where replicated gradients are): of the widest dtype
        among the parameters', at least float32, in which the squares of 16-bit gradients are also summed.

    Raises:
        TypeError: not a module, or a parameter is a DTensor.
        ValueError: norm_type is not positive.
        ShapeError: a layer's parameter was replaced by something else (parametrized, pruned, of another shape).
        LayoutError: layers that share a parameter store it differently.
        RuntimeError: the norm is not finite, with error_if_nonfinite.
        DisagreementError: ranks came with another norm_type or other parameters.
    """
    order = float(norm_type)
    if not order > 0:
        raise ValueError(f"norm_type must be positive (math.inf for the largest absolute value), not {norm_type}")
    parameters = named_shardings(model)
    if not parameters:
        return torch.tensor(0.0)
    device = parameters[0][1].device
    by_axes: dict[tuple[Axis, ...], list[Tensor]] = {}
    meshes: dict[Axis, MeshView] = {}
    for _, parameter, sharding in parameters:
        axes: list[Axis] = []
        if sharding is not None:
            mesh_view = view(sharding.mesh)
            axes = [mesh_view.axes[name] for name in sharding.spec.axes if mesh_view.shape[name] > 1]
            meshes.update((axis, mesh_view) for axis in axes)
        gradients = by_axes.setdefault(tuple(sorted(axes, key=lambda axis: axis.name)), [])
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    text = "\n".join((f"norm_type {order}", *(f"{name} stored as {s.spec}" for name, _, s in parameters if s)))
    for axis, mesh_view in meshes.items():
        agree(mesh_view, axis, lambda: text, "the norm of the gradients")
    parts = {axes: _accumulate(gradients, order, device) for axes, gradients in by_axes.items()}
    for axis in meshes:
        sharded = [axes for axes in parts if axis in axes]
        whole = _combine(torch.stack([parts[axes] for axes in sharded]), axis, order)
        parts.update(zip(sharded, whole.unbind()))
    wide = reduce(torch.promote_types, (parameter.dtype for _, parameter, _ in parameters), torch.float32)
    total = _norm(parts.values(), order).to(wide)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"the norm of order {order} of the gradients is {float(total)}: they cannot be clipped. With "
            "error_if_nonfinite=False they are scaled by it all the same"
        )
    nn.utils.clip_grads_with_norm_([parameter for _, parameter, _ in parameters], max_norm, total)
    return total


def clip_grad_norm_collectives(model: nn.Module) -> list[Collective]:
    """Every collective of `clip_grad_norm_`, with its bytes, but for the comparison between ranks at first sight."""
    sets: dict[str, set[tuple[str, ...]]] = {}
    axes: dict[str, Axis] = {}
    for _, _, sharding in named_shardings(model):
        if sharding is not None:
            mesh_view = view(sharding.mesh)
            sharding_axes = tuple(sorted(name for name in sharding.spec.axes if mesh_view.shape[name] > 1))
            for name in sharding_axes:
                sets.setdefault(name, set()).add(sharding_axes)
                axes[name] = mesh_view.axes[name]
    found = []
    for name, groups in sets.items():
        count = sent("all-reduce", 2 * len(groups), axes[name].size, axes[name].index)  # of what `_accumulate` makes
        found.append(Collective("clip", "all-reduce", "norms", name, 8 * count))
    return found


# A norm in three steps: what this rank has of it, what the ranks of an axis have together, and the norm. Shards of one
# set of axes are accumulated together. For the largest value NaN is carried beside it: whether a reduction by MAX
# passes NaN on depends on the backend.


def _accumulate(gradients: Iterable[Tensor], order: float, device: torch.device) -> Tensor:
    """Σ|g|^p of some gradients, in float64; for p = inf, the largest |g| and whether there was a NaN. Shape [2]."""
    norms = [
        torch.linalg.vector_norm(g, order, dtype=torch.promote_types(g.dtype, torch.float32)).to(device, torch.float64)
        for g in gradients
        if g.numel()
    ]
    if not norms:
        return torch.zeros(2, dtype=torch.float64, device=device)
    every = torch.stack(norms)
    if order == inf:
        return torch.stack((every.nan_to_num(0.0, inf).max(), every.isnan().any().double()))
    total = every.pow(order).sum()
    return torch.stack((total, torch.zeros_like(total)))


def _combine(parts: Tensor, axis: Axis, order: float) -> Tensor:
    op = dist.ReduceOp.MAX if order == inf else dist.ReduceOp.SUM
    return AllReduce(axis, "all-reduce of the gradients' norm", op)(parts)


def _norm(parts: Iterable[Tensor], order: float) -> Tensor:
    totals, invalid = torch.stack(list(parts)).unbind(1)
    if order == inf:
        return totals.max().masked_fill(invalid.any(), torch.nan)
    return totals.sum().pow(1 / order)
