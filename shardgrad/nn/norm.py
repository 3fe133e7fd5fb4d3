"""Norms over the last dims, with parameters that are replicated while the rows may be sharded over an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.errors import ShapeError
from shardgrad.layout.cost import Collective
from shardgrad.layout.notation import parse_tensor
from shardgrad.nn.layer import Layer
from shardgrad.nn.parallel import OnRows
from shardgrad.nn.replicated import for_rows, for_rows_collectives


class _Norm(Layer):
    weight: Tensor | None
    bias: Tensor | None
    takes = OnRows

    def __init__(
        self, normalized_shape: int | Sequence[int], affine: bool, bias: bool, where: Mapping[str, Any]
    ) -> None:
        super().__init__(where)
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        count = len(self.normalized_shape)
        self._sizes = dict(zip(("m",) if count == 1 else [f"m{at}" for at in range(count)], self.normalized_shape))
        for name, there in (("weight", affine), ("bias", affine and bias)):
            if there:
                spec = parse_tensor(f"{name[0].upper()}[{','.join(self._sizes)}]")
                self.add(name, self.stored(spec, vector=True))
            else:
                self.register_parameter(name, None)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Ones and zeros, as torch's."""
        with torch.no_grad():
            if self.weight is not None:
                self.weight.fill_(1)
            if self.bias is not None:
                self.bias.zero_()

    def _parameters_for(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as this rank's rows use them: where rows are sharded, their gradients are summed, both in one
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
        weight, *bias = for_rows(parameters, list(self._shardings.values()), self._axes_of_rows())
        return weight, bias[0] if bias else None

    def _axes_of_rows(self) -> list[str]:
        """The axes over which ranks hold different rows."""
        sequence = [] if self.sequence_dim is None else [self.axis]
        return sequence if self.data is None else [*sequence, self.data.axis]

    def collectives(self, shape: Sequence[int], dtype: Any = None) -> list[Collective]:
        """Every collective of this rank's forward and backward, whatever the shape and dtype of x."""
        shardings = list(self._shardings.values())
        own = None if self.weight is None else self.weight.dtype
        return list(for_rows_collectives("dW and db", shardings, self._axes_of_rows(), own))

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, affine={self.weight is not None}, {self._flags()}"


class LayerNorm(_Norm):
    """nn.LayerNorm whose parameter gradients are complete also where each rank has only some of the rows.

    With `sequence_dim` the gradients of weight and bias are summed over the axis, in one all-reduce; without it every
    rank has all the rows, and nothing is summed.

    Args:
        normalized_shape, eps, elementwise_affine, bias: as of nn.LayerNorm.
        parallel, or mesh, axis, sequence_dim, data, device, dtype: as of `Parallel`. Parameters are replicated.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        **where: Unpack[OnRows],
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, bias, where)
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
        **where: Unpack[OnRows],
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, False, where)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, _ = self._parameters_for(x)
        wide = x if weight is None else x.to(weight.dtype)
        return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(x.dtype)
