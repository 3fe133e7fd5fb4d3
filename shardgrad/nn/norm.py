"""Norms over the last dims, with parameters that are replicated while the rows may be cut over an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.errors import ShapeError
from shardgrad.layout import cost
from shardgrad.layout.batch_axis import BatchAxis, stored_over
from shardgrad.nn.linear import check_sequence_dim
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.shared import replicate_together, summed_together


class _Norm(ShardedModule):
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        affine: bool,
        bias: bool,
        mesh: DeviceMesh,
        axis: str,
        sequence_dim: int | None,
        data: BatchAxis | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(mesh, (axis,) if data is None else (axis, data.axis))
        check_sequence_dim(sequence_dim, type(self).__name__)
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape, self.axis, self.sequence_dim, self.data = shape, axis, sequence_dim, data
        letters = ("m",) if len(shape) == 1 else tuple(f"m{at}" for at in range(len(shape)))
        for name, there in (("weight", affine), ("bias", affine and bias)):
            if there:
                storage = f"{name[0].upper()}[{','.join(letters)}]"
                sizes = dict(zip(letters, shape))
                self.declare(name, stored_over(data, storage, sizes, vector=True), sizes, device, dtype)
            else:
                self.register_parameter(name, None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones and zeros, as torch's."""
        with torch.no_grad():
            if self.weight is not None:
                self.weight.fill_(1)
            if self.bias is not None:
                self.bias.zero_()

    def _parameters_for(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as this rank's rows use them: where rows are cut, their gradients are summed, both in one
        all-reduce for each axis, but for one that they are marked with."""
        rows = x.dim() - len(self.normalized_shape)
        if self.weight is None:
            return None, None
        if self.sequence_dim is not None and (
            not -x.dim() <= self.sequence_dim < x.dim() or self.sequence_dim % x.dim() >= rows
        ):
            raise ShapeError(
                f"{type(self).__name__}: sequence_dim={self.sequence_dim} of an input of shape {tuple(x.shape)} is not "
                f"a row dim (the last {len(self.normalized_shape)} are normalized)"
            )
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        for axis in self._summed_over():
            parameters = replicate_together(parameters, self.mesh, axis)
        return parameters[0], None if self.bias is None else parameters[1]

    def _summed_over(self) -> list[str]:
        """The axes that cut the rows, and over which the gradients are not left to the caller."""
        sequence = [] if self.sequence_dim is None else [self.axis]
        return sequence if self.data is None or self.data.accumulate else [*sequence, self.data.axis]

    def collectives(self, shape: Sequence[int], dtype: Any = None) -> list[cost.Collective]:
        """Every collective of this rank's forward and backward, whatever the shape and dtype of x."""
        parameters = list(self.parameters())
        return (
            [
                row
                for axis in self._summed_over()
                for row in summed_together("dW and db", parameters, self.mesh, axis, parameters[0].dtype)
            ]
            if parameters
            else []
        )

    def extra_repr(self) -> str:
        sequence = f", sequence_dim={self.sequence_dim}" if self.sequence_dim is not None else ""
        return f"{self.normalized_shape}, affine={self.weight is not None}, axis={self.axis!r}{sequence}"


class LayerNorm(_Norm):
    """nn.LayerNorm whose parameter gradients are complete also where each rank has only some of the rows.

    Args:
        normalized_shape, eps, elementwise_affine, bias: as of nn.LayerNorm.
        mesh, axis: the axis of the mesh.
        sequence_dim: the dim of the input that is cut over the axis (sequence parallelism): the gradients of weight and
            bias are then summed over it, in one all-reduce. None: every rank has all the rows, and nothing is summed.
        data: the axis that cuts the batch, and how gradients are summed over it; None without data parallelism.
        device, dtype: of the parameters, which are replicated.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        data: BatchAxis | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, bias, mesh, axis, sequence_dim, data, device, dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters_for(x)
        wide = x if weight is None else x.to(weight.dtype)  # 16-bit activations and float32 parameters: in float32
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(_Norm):
    """nn.RMSNorm whose weight gradient is complete also where each rank has only some of the rows.

    Arguments as of nn.RMSNorm and of `LayerNorm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        data: BatchAxis | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, False, mesh, axis, sequence_dim, data, device, dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, _ = self._parameters_for(x)
        wide = x if weight is None else x.to(weight.dtype)
        return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(x.dtype)
