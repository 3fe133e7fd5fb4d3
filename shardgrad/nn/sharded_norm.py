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
from dataclasses import dataclass
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
    return sharded_norm(SquaresNorm(size, eps), x, weight, None, mesh, axis)


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
    over = axis_on(mesh, axis, "sharded_layer_norm")
    if len(features) != over.size or x.shape[-1] != features[over.index]:
        raise ShapeError(
            f"x has {x.shape[-1]} features on rank {over.index} of {over}, but features={list(features)} are those of "
            "the ranks in their order"
        )
    return sharded_norm(MomentsNorm(tuple(features), eps), x, weight, bias, mesh, axis)


def sharded_norm(
    norm: SquaresNorm | MomentsNorm,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mesh: DeviceMesh,
    axis: str = "tp",
) -> Tensor:
    """Either of both."""
    own = wide(x, weight, bias)
    return norm.finish(own, norm.share(norm.stats(own), mesh, axis), weight, bias).to(x.dtype)


@dataclass(frozen=True)
class SquaresNorm:
    """RMSNorm of some of the features: what they bring to a row, and y by what all of them do.

    size, eps: as of `sharded_rms_norm`.
    """

    size: int
    eps: float | None

    def stats(self, x: Tensor) -> Tensor:
        """Σ x²: [..., features] → [..., 1]."""
        return x.square().sum(-1, keepdim=True)

    def share(self, squares: Tensor, mesh: DeviceMesh, axis: str) -> Tensor:
        return summed(squares, mesh, axis)

    def finish(self, x: Tensor, squares: Tensor, weight: Tensor | None, _: Tensor | None) -> Tensor:
        """squares: Σ x² over all features."""
        y = x * torch.rsqrt(squares / self.size + (torch.finfo(x.dtype).eps if self.eps is None else self.eps))
        return y if weight is None else y * weight


@dataclass(frozen=True)
class MomentsNorm:
    """LayerNorm of some of the features, likewise.

    features, eps: as of `sharded_layer_norm`.
    """

    features: tuple[int, ...]
    eps: float

    def stats(self, x: Tensor) -> Tensor:
        """The mean, and Σ (x - mean)²: [..., features] → [2, ...]."""
        own = x.sum(-1) / max(1, x.shape[-1])
        return torch.stack((own, (x - own.unsqueeze(-1)).square().sum(-1)))

    def share(self, stats: Tensor, mesh: DeviceMesh, axis: str) -> Tensor:
        return all_gather(stats.unsqueeze(0), mesh, axis, 0, size=len(self.features))

    def finish(self, x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """stats: of all parts of the features, [parts, 2, ...]."""
        counts = x.new_tensor(self.features).view(-1, *(1,) * (x.dim() - 1))
        mean, variance = together(counts, *stats.unbind(1))
        y = (x - mean.unsqueeze(-1)) * torch.rsqrt(variance + self.eps).unsqueeze(-1)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


def together(counts: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of all parts, along dim 0, of which each has so many numbers, a mean, and Σ (x - its mean)²."""
    size = counts.sum(0)
    mean = (counts * means).sum(0) / size
    return mean, (squares + counts * (means - mean).square()).sum(0) / size


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


def wide(x: Tensor, *parameters: Tensor | None) -> Tensor:
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


def weight_and_bias(parameters: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Of those that there are."""
    weight, bias = [*parameters, None, None][:2]
    return weight, bias
