"""What is global over shards: the number of a model's parameters, and the norm of its gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from math import isinf, isnan, prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardgrad.arguments import told
from shardgrad.comm.agree import agree
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.errors import shorten
from shardgrad.layout.cost import Collective, sent
from shardgrad.nn.dtensors import Place, is_dtensor, local, pieces, sharding_places
from shardgrad.nn.exact_norm import Named, pieces_of_norm, pieces_of_norm_collectives
from shardgrad.nn.pieces import is_exact
from shardgrad.nn.sharding import ParamSharding
from shardgrad.nn.shardings import named_shardings


@told
def num_parameters(model: nn.Module) -> int:
    """The number of a model's parameters as one device would hold them: shards added up, replicas and shared ones
    counted once. No communication.

    Raises:
        TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
    """
    return sum(
        parameter.numel() if sharding is None else prod(sharding.global_shape)
        for _, parameter, sharding in named_shardings(model)
    )


@told
@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients in place so that their norm, over all shards, replicas counted once, is at most `max_norm`.

    torch.nn.utils.clip_grad_norm_ for a model of shards: (Σ|g|^p)^(1/p) over the global gradients, each of which is
    then multiplied by min(1, max_norm / (norm + 1e-6)). One all-reduce of a few numbers for each axis that shards a
    parameter, whether or not this rank has gradients; called on every rank of those axes. Layers may be on several
    meshes. Gradients must be complete: a sum left to the caller (`W[d,m]{dp}`) comes first.

    Args:
        parameters: a module, or the part of one whose gradients are meant; those without gradient are left out. Or, as
            torch takes them, parameters: DTensors, which know their shards, or in one process any. A plain tensor of
            several ranks does not say whether it is a shard: then name the module.
        max_norm: the largest norm, alike on every rank; math.inf only measures.
        norm_type: p, any number but 0, or math.inf (-math.inf) for the largest (least) absolute value.
        error_if_nonfinite: whether to raise, on every rank, instead of scaling by a norm that is inf or NaN.
        foreach: whether gradients are scaled together, as of torch's; None: where torch does.

    Returns:
        The norm before scaling, a scalar alike on every rank (where replicated gradients are): of the widest dtype
        among the parameters', at least float32, in which the squares of 16-bit gradients are also summed.

    Raises:
        TypeError: not a module, nor such parameters.
        MeshError: a DTensor is sharded over an axis that shards the layer's parameter already.
        ValueError: norm_type is 0 or NaN.
        ShapeError: a layer's parameter was replaced by something else (parametrized, pruned, of another shape).
        LayoutError: layers that share a parameter store it differently.
        RuntimeError: the norm is not finite, with error_if_nonfinite.
        DisagreementError: ranks came with another norm_type or other parameters.
    """
    order, most = _number(norm_type, "norm_type"), _number(max_norm, "max_norm")
    if order == 0 or isnan(order):
        raise ValueError(f"norm_type must be a number but 0 (math.inf for the largest absolute value), not {order}")
    named = _named(parameters)
    if not named:
        return torch.tensor(0.0)
    device = named[0][1].device
    by_axes: dict[tuple[Axis, ...], list[Tensor]] = {}
    meshes: dict[Axis, MeshView] = {}
    for _, parameter, sharding in named:
        places = _places(parameter, sharding)
        meshes.update((axis, mesh_view) for leaf in places for mesh_view, axis in leaf)
        held = [] if parameter.grad is None else pieces(parameter.grad, sharding)
        for at, leaf in enumerate(places):
            gradients = by_axes.setdefault(_in_order(leaf), [])
            gradients += [gradient for gradient, _ in held[at : at + 1]]
    text = "\n".join((f"norm_type {order}", *(line for each in named for line in _described(*each))))
    for axis, mesh_view in meshes.items():
        agree(mesh_view, axis, lambda: text, "the norm of the gradients")
    if any(sharding is not None and is_exact(sharding.mesh) for _, _, sharding in named):
        parts = pieces_of_norm(named, partial(_accumulate, order=order, device=device))
    else:
        parts = [_accumulate(gradients, order, device) for gradients in by_axes.values()]
        for axis in meshes:
            sharded = [at for at, axes in enumerate(by_axes) if axis in axes]
            whole = _combine(torch.stack([parts[at] for at in sharded]), axis, order)
            for at, one in zip(sharded, whole.unbind()):
                parts[at] = one
    wide = reduce(torch.promote_types, (parameter.dtype for _, parameter, _ in named), torch.float32)
    total = _norm(parts, order).to(wide)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"the norm of order {order} of the gradients is {float(total)}: they cannot be clipped. With "
            "error_if_nonfinite=False they are scaled by it all the same"
        )
    _scale([parameter for _, parameter, _ in named], most, total, foreach)
    return total


def _number(value: object, name: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # which says so
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} must be a number, not {type(value).__name__} {shorten(value)}") from None


def _named(parameters: object) -> Sequence[Named]:
    """Parameters by name, each with its storage.

    Raises:
        TypeError: they do not say how they are stored.
    """
    if isinstance(parameters, nn.Module):
        return named_shardings(parameters)
    if not isinstance(parameters, Tensor | Iterable) or isinstance(parameters, str | bytes):
        raise TypeError(
            f"parameters must be a module, a tensor or tensors, not {type(parameters).__name__} {shorten(parameters)}"
        )
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    for at, one in enumerate(tensors):
        if not isinstance(one, Tensor):
            raise TypeError(f"parameters.{at} must be a tensor, not {type(one).__name__} {shorten(one)}")
        if not alone and not is_dtensor(one):
            raise TypeError(
                f"parameters.{at} of shape {tuple(one.shape)} does not say how it is stored, and may be a shard: pass "
                "the model, or the part of it that is meant, instead of model.parameters()"
            )
    return [(f"parameters.{at}", one, None) for at, one in enumerate(tensors)]


def clip_grad_norm_collectives(model: nn.Module) -> list[Collective]:
    """Every collective of `clip_grad_norm_`, with its bytes, but for the comparison between ranks at first sight."""
    if any(sharding is not None and is_exact(sharding.mesh) for _, _, sharding in named_shardings(model)):
        return pieces_of_norm_collectives(named_shardings(model))
    sets: dict[Axis, set[tuple[Axis, ...]]] = {}
    for _, parameter, sharding in named_shardings(model):
        for places in _places(parameter, sharding):
            for _, axis in places:
                sets.setdefault(axis, set()).add(_in_order(places))
    found = []
    for axis, groups in sets.items():
        count = sent("all-reduce", 2 * len(groups), axis.size, axis.index)  # of what `_accumulate` makes
        found.append(Collective("clip", "all-reduce", "norms", axis.name, 8 * count))
    return found


def _places(parameter: Tensor, sharding: ParamSharding | None) -> list[list[Place]]:
    """The axes over which a parameter is in shards, shardgrad's and torch's; of a concatenation, those of each part."""
    beside = sharding_places(parameter)
    if sharding is None:
        return [beside]
    found = []
    for leaf in sharding.leaves:
        mesh_view = view(leaf.mesh)
        own = [(mesh_view, mesh_view.axes[name]) for name in leaf.spec.axes if mesh_view.shape[name] > 1]
        found.append([*own, *beside])
    return found


def _in_order(places: Iterable[Place]) -> tuple[Axis, ...]:
    return tuple(sorted((axis for _, axis in places), key=lambda axis: (axis.name, axis.ranks)))


def _described(name: str, parameter: Tensor, sharding: ParamSharding | None) -> Iterator[str]:
    specs = [] if sharding is None else [str(leaf.spec) for leaf in sharding.leaves]
    specs += [str(parameter.placements)] if is_dtensor(parameter) else []  # type: ignore[attr-defined]
    if specs:
        yield f"{name} stored as {', '.join(specs)}"


def _scale(parameters: Sequence[Tensor], max_norm: float, total: Tensor, foreach: bool | None) -> None:
    """torch's, which multiplies a DTensor by no tensor that is none."""
    plain = [parameter for parameter in parameters if not is_dtensor(parameter)]
    nn.utils.clip_grads_with_norm_(plain, max_norm, total, foreach)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None and is_dtensor(parameter):
            gradient = local(parameter.grad)
            gradient.mul_(factor.to(gradient.device))


# A norm in three steps: what this rank has of it, what the ranks of an axis have together, and the norm. Shards of one
# set of axes are accumulated together. For the largest value, or the largest of the negative ones, which is the least,
# NaN is carried beside it: whether a reduction by MAX passes NaN on depends on the backend.


def _accumulate(gradients: Iterable[Tensor], order: float, device: torch.device) -> Tensor:
    """Σ|g|^p of some gradients, in float64; for p = ±inf, the largest ±|g| and whether there was a NaN. Shape [2]."""
    norms = [
        torch.linalg.vector_norm(g, order, dtype=torch.promote_types(g.dtype, torch.float32)).to(device, torch.float64)
        for g in gradients
        if g.numel()
    ]
    if not norms:
        # Not made of a list, which would be copied from the host, and the host wait.
        none = torch.zeros(2, dtype=torch.float64, device=device)
        return none.index_fill_(0, none.new_zeros(1, dtype=torch.int64), -torch.inf) if order == -torch.inf else none
    every = torch.stack(norms)
    if isinf(order):
        largest = every.nan_to_num(0.0, torch.inf).mul(1 if order > 0 else -1).max()
        return torch.stack((largest, every.isnan().any().double()))
    total = every.pow(order).sum()
    return torch.stack((total, torch.zeros_like(total)))


def _combine(parts: Tensor, axis: Axis, order: float) -> Tensor:
    op = dist.ReduceOp.MAX if isinf(order) else dist.ReduceOp.SUM
    return AllReduce(axis, "all-reduce of the gradients' norm", op)(parts)


def _norm(parts: Iterable[Tensor], order: float) -> Tensor:
    totals, invalid = torch.stack(list(parts)).unbind(1)
    if isinf(order):
        return totals.max().abs().masked_fill(invalid.any(), torch.nan)
    return totals.sum().pow(1 / order)
