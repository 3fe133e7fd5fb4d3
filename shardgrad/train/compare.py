"""Is a difference from one device rounding or a mistake? The first step's loss and every gradient, measured.

One device computes the same step twice: in float64, which counts as exact, and in the working precision, whose distance
from exact is what rounding alone does to this very step. The sharded step sums in another order, so its distance should
be of that size; a missing or doubled reduction is wrong in the first digit, some 10⁵ times as far in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isnan

import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import view
from shardgrad.nn.module import ParamSharding
from shardgrad.nn.shardings import named_shardings
from shardgrad.ops.shard import unshard
from shardgrad.train.decoder import Decoder
from shardgrad.train.reference import Reference

BOUND = 30.0
"""How many times as far from exact as one device's rounding a sharded tensor may be. Two roundings of one tensor differ
by chance: measured on 1 to 4 ranks, by at most 1.3 times where it has thousands of elements, 7 times where it has 8."""


@dataclass(frozen=True)
class Row:
    """One tensor's distances (Euclidean norms) from its exact value.

    error: of the sharded run, on the rank whose copy is farthest. single: of one device in the working precision. norm:
    the exact value's own norm. eps: of the working precision.
    """

    name: str
    error: float
    single: float
    norm: float
    eps: float

    @property
    def ratio(self) -> float:
        """error in units of what rounding does: `single`, or one unit of roundoff of the tensor where that is more.

        Infinite if anything is not finite.
        """
        yardstick = max(self.single, self.eps * self.norm)
        if yardstick == 0 and self.error == 0:
            return 0.0
        ratio = self.error / yardstick if yardstick > 0 else inf
        return inf if isnan(ratio) or isnan(self.norm) or yardstick == inf else ratio


@dataclass(frozen=True)
class Comparison:
    """The loss first, then every parameter's gradient."""

    rows: tuple[Row, ...]

    @property
    def worst_first(self) -> list[Row]:
        return sorted(self.rows, key=lambda row: row.ratio, reverse=True)

    @property
    def passed(self) -> bool:
        return all(row.ratio <= BOUND for row in self.rows)


def compare(
    model: Decoder, loss: Tensor, ids: Tensor, targets: Tensor, reference: Callable[[], Reference]
) -> Comparison | None:
    """Compare a step just done, its gradients in place and complete, with the reference; called on every rank.

    Args:
        loss: of the whole batch, as the step found it.
        ids, targets: the whole batch [b, s], alike on every rank; one device takes it at once, whatever the sharded
            step made of it (micro-batches, parts of ranks).
        reference: makes the model on one device, with any values.

    Returns:
        The comparison on the first rank of the mesh, which alone computes the reference; None on the others.
    """
    first = not any(view(model.mesh).coordinate.values())
    values: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    apart: dict[str, float] = {}
    for name, value, grad, distance in _assembled(model):
        apart[name] = distance
        if first:
            values[name], grads[name] = value, grad
    if not first:
        return None
    device, dtype = loss.device, next(model.parameters()).dtype
    with torch.random.fork_rng(devices=()):  # making the reference draws numbers that other ranks do not draw
        exact = _step(reference().to(device, torch.float64), values, ids, targets)
        single = _step(reference().to(device, dtype), values, ids, targets, model.compute_dtype)
    eps = torch.finfo(model.compute_dtype or dtype).eps
    sharded = {"loss": loss.detach(), **grads}
    return Comparison(
        tuple(_row(name, sharded[name], single[name], exact[name], apart.get(name, 0.0), eps) for name in sharded)
    )


def _assembled(model: Decoder) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Name, global value and global gradient of each parameter, and how far apart the ranks' copies of the gradient
    are; a gradient that is missing is NaN."""
    for name, parameter, sharding in named_shardings(model):
        assert sharding is not None, f"{name} belongs to no shardgrad layer"
        grad = torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad
        yield (
            name,
            unshard(parameter, sharding.spec, sharding.mesh, sharding.sizes),
            unshard(grad, sharding.spec, sharding.mesh, sharding.sizes),
            _apart(grad, sharding),
        )


def _apart(grad: Tensor, sharding: ParamSharding) -> float:
    """How far the copy of a gradient that is farthest from the first rank's is from it, at most; alike on every rank.

    A gradient is assembled from the first of the ranks that hold the same part of it: the other copies are compared
    with that one here, an axis at a time.
    """
    axes = view(sharding.mesh).axes.values()
    total = 0.0
    for axis in axes:
        if axis.size == 1 or axis.name in sharding.spec.axes:
            continue
        first = grad.clone() if axis.index == 0 else torch.zeros_like(grad)
        first = AllReduce(axis, "all-reduce of the first rank's gradient")(first)
        square = (grad - first).double().square().sum().nan_to_num(inf, inf)
        for other in axes:
            if other.size > 1:
                op = dist.ReduceOp.SUM if other.name in sharding.spec.axes else dist.ReduceOp.MAX
                square = AllReduce(other, "all-reduce of the copies' distance", op)(square)
        total += float(square.sqrt())
    return total


def _step(
    reference: Reference,
    values: dict[str, Tensor],
    ids: Tensor,
    targets: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Loss and gradients on one device, by the sharded model's names."""
    reference.load(values)
    loss = reference.loss(ids, targets, compute_dtype)
    loss.backward()
    found = {"loss": loss.detach()}
    for name in values:
        grad = reference.parameter_of(name).grad
        assert grad is not None, f"the reference does not use {name}"
        found[name] = grad
    return found


def _row(name: str, sharded: Tensor, single: Tensor, exact: Tensor, apart: float, eps: float) -> Row:
    def distance(tensor: Tensor) -> float:
        return float((tensor.double().flatten() - exact.flatten()).norm())

    return Row(name, distance(sharded) + apart, distance(single), float(exact.norm()), eps)
