"""Norms over features that an axis shards: each rank normalises its own, with the sums of all of them.

| function             | forward over the axis                  | backward over the axis          | numbers a row |
| -------------------- | -------------------------------------- | ------------------------------- | ------------- |
| `sharded_rms_norm`   | all-reduce of Σ x²                     | all-reduce of its gradient      | 1, 1          |
| `sharded_layer_norm` | all-gather of each rank's mean and     | reduce-scatter of their         | 2, 2 × ranks  |
|                      | Σ (x - mean)²                          | gradients                       |               |

The gradients of weight and bias are local: a rank has all the rows of its own features. Backward follows from
`comm.adjoint`'s pairs, so that both have all derivatives and torch.compile follows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.adjoint import all_gather, all_reduce, replicate
from shardgrad.comm.mesh import axis_on
from shardgrad.errors import ShapeError
from shardgrad.layout.cost import Collective
from shardgrad.nn.replicated import one


def sharded_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float | None, size: int, mesh: DeviceMesh, axis: str = "tp"
) -> Tensor:
    """F.rms_norm over a last dim of `size` features that an axis shards: y = x / √(Σ x² / size + eps) · weight.

    Sums are in float32 for 16-bit x, and so is all that follows until the result, which is of x's dtype.

    Args:
        x: [..., features of this rank], however many, perhaps none.
        weight: [features of this rank], or None.
        eps: None: torch's, the distance of 1 to the next number of the dtype that is computed in.
        size: over all ranks of the axis.

    Raises:
        ShapeError: weight does not have x's features.
    Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.
    """
    wide = _wide(x, weight)
    squares = summed(wide.square().sum(-1, keepdim=True), mesh, axis)
    scale = torch.rsqrt(squares / size + (torch.finfo(wide.dtype).eps if eps is None else eps))
    y = wide * scale
    return (y if weight is None else y * weight).to(x.dtype)


def sharded_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    features: Sequence[int],
    mesh: DeviceMesh,
    axis: str = "tp",
) -> Tensor:
    """F.layer_norm over a last dim that an axis shards: y = (x - μ) / √(σ² + eps) · weight + bias.

    μ and σ² are put together of the ranks' own, which does not cancel where μ is much larger than σ. Dtypes are as of
    `sharded_rms_norm`.

    Args:
        x: [..., features of this rank], perhaps none.
        weight, bias: [features of this rank], or None.
        features: how many each rank of the axis has, in its order.

    Raises:
        ShapeError: x does not have this rank's features, or weight and bias not x's.
    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances",
        equation 2.1.
    """
    over, size = axis_on(mesh, axis, "sharded_layer_norm"), sum(features)
    if len(features) != over.size or x.shape[-1] != features[over.index]:
        raise ShapeError(
            f"x has {x.shape[-1]} features on rank {over.index} of {over}, but features={list(features)} are those of "
            "the ranks in their order"
        )
    wide = _wide(x, weight, bias)
    own = wide.sum(-1) / max(1, x.shape[-1])
    stats = torch.stack((own, (wide - own.unsqueeze(-1)).square().sum(-1))).unsqueeze(0)
    means, squares = all_gather(stats, mesh, axis, 0, size=over.size).unbind(1)  # [ranks, ...]
    counts = wide.new_tensor(features).view(-1, *(1,) * (x.dim() - 1))
    mean = (counts * means).sum(0) / size
    variance = (squares + counts * (means - mean).square()).sum(0) / size
    y = (wide - mean.unsqueeze(-1)) * torch.rsqrt(variance + eps).unsqueeze(-1)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def sharded_norm_collectives(
    norm: str, rows: int, dtype: Any, mesh: DeviceMesh, axis: str = "tp"
) -> Iterator[Collective]:
    """Every collective of one of both functions, forward and backward.

    Args:
        norm: "rms" or "layer".
        rows: of x on this rank.
        dtype: that is computed in: x's and weight's common one, at least float32.
    """
    ranks = axis_on(mesh, axis).size
    if norm == "rms":
        yield from one(mesh, "forward", "all-reduce", "norm: squares", axis, rows, dtype)
        yield from one(mesh, "dX", "all-reduce", "norm: d squares", axis, rows, dtype)
    else:
        yield from one(mesh, "forward", "all-gather", "norm: moments", axis, 2 * rows, dtype)
        yield from one(mesh, "dX", "reduce-scatter", "norm: d moments", axis, 2 * rows * ranks, dtype)


def summed(x: Tensor, mesh: DeviceMesh, axis: str) -> Tensor:
    """The sum over the axis, which each rank then uses for its own features: its gradient is summed as well."""
    return replicate(all_reduce(x, mesh, axis), mesh, axis)


def _wide(x: Tensor, *parameters: Tensor | None) -> Tensor:
    """x in the dtype that is computed in."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for parameter in parameters:
        if parameter is not None:
            if parameter.shape != x.shape[-1:]:
                raise ShapeError(
                    f"a parameter of shape {tuple(parameter.shape)} for x of local shape {tuple(x.shape)}: both have "
                    "the features of this rank in their last dim"
                )
            dtype = torch.promote_types(dtype, parameter.dtype)
    return x.to(dtype)
