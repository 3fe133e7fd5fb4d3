"""Column and row parallel linear layers: torch's weight `[out, in]`, one of its dims cut over an axis."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from math import sqrt

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.errors import ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.nn import init
from shardgrad.nn.module import ShardedModule
from shardgrad.ops.matmul import bind, run
from shardgrad.ops.product import Product

_ROWS = {0: (), 1: ("n",), 2: ("b", "s"), 3: ("a", "b", "s")}


def row_letters(count: int) -> tuple[str, ...]:
    """Letters for the leading dims of an input: `b, s` for two of them."""
    return _ROWS.get(count) or tuple(f"n{at}" for at in range(count))


def sequence_letter(dims: int, sequence_dim: int, who: str) -> int:
    """The sequence dim as a non-negative index among the row dims of a tensor of `dims` dims.

    Raises:
        ShapeError: the tensor has no such dim, or it is the last one, which holds the features.
    """
    if not -dims <= sequence_dim < dims or sequence_dim % dims == dims - 1:
        raise ShapeError(
            f"{who}: sequence_dim={sequence_dim} of {dims} dims is not a row dim (the last one holds features)"
        )
    return sequence_dim % dims


class _ParallelLinear(ShardedModule):
    """Y = X Wᵀ + b by one layout for each number of input dims."""

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    _weight: str
    _bias: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        keep: Collection[str] = (),
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mesh, (axis,))
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ShapeError(f"{type(self).__name__}: {name} must be at least 1, not {size}")
        self.in_features, self.out_features, self.axis = in_features, out_features, axis
        self.sequence_dim = sequence_dim
        self.keep, self.reduce_dtype = tuple(keep), reduce_dtype
        self._sizes = {"d": in_features, "m": out_features}
        self.declare("weight", self._weight.format(axis=axis), self._sizes, device, dtype)
        if bias:
            self.declare("bias", self._bias.format(axis=axis), self._sizes, device, dtype)
        else:
            self.register_parameter("bias", None)
        self._products: dict[tuple[int, bool], tuple[Product, str | None]] = {}
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Linear's initial values: uniform in ±1/√in_features, of the global in_features."""
        values = partial(init.uniform, 1 / sqrt(self.in_features))
        self.fill("weight", values, generator)
        if self.bias is not None:
            self.fill("bias", values, generator)

    def layout(self, dims: int) -> Layout:
        """The layout of this layer for an input of so many dims."""
        raise NotImplementedError

    def _plus_bias(self) -> str:
        return f" + {self._stored['bias'].spec}" if self.bias is not None else ""

    def _letters(self, dims: int) -> tuple[str, str, str | None]:
        """The row letters, uncut and with the sequence cut, and the sequence's letter."""
        rows = row_letters(dims - 1)
        uncut = "".join(f"{letter}," for letter in rows)
        if self.sequence_dim is None:
            return uncut, uncut, None
        at = sequence_letter(dims, self.sequence_dim, type(self).__name__)
        cut = "".join(f"{x}/{self.axis}," if i == at else f"{x}," for i, x in enumerate(rows))
        return uncut, cut, rows[at]

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y.

        Args:
            x: [..., in_features], stored as `self.layout(x.dim())["X"]`.
            sequence_size: the size of the sequence dim over all ranks. Only of use to a column parallel layer with
                `sequence_dim`, whose ranks otherwise exchange it at every call (one small exchange).

        Raises:
            ShapeError: x does not fit; see `matmul` for the rest.
        """
        key = x.dim(), self.bias is None
        found = self._products.get(key)
        if found is None:
            found = self._products[key] = self._bind(x)
        product, letter = found
        sizes = self._sizes if sequence_size is None or letter is None else {**self._sizes, letter: sequence_size}
        return run(product, x, [self.weight], [] if self.bias is None else [self.bias], sizes)[0]

    def _bind(self, x: Tensor) -> tuple[Product, str | None]:
        if x.dim() == 0:
            raise ShapeError(f"{type(self).__name__} needs an input of at least one dim, got a scalar")
        product = bind((self.layout(x.dim()),), (self.bias is not None,), self.mesh, self.keep, self.reduce_dtype)
        return product, self._letters(x.dim())[2]

    def extra_repr(self) -> str:
        sequence = f", sequence_dim={self.sequence_dim}" if self.sequence_dim is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"axis={self.axis!r}{sequence}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer whose output features are cut over an axis: `X[n,d] W[m/tp,d] -> Y[n,m/tp] + B[m/tp]`.

    forward: no communication; dX: all-reduce; dW, db: none. With `sequence_dim`, x arrives cut along that dim
    (`X[n/tp,d]`): forward all-gathers x, dX is reduce-scattered, and dW gathers x again unless `keep=("X",)`.

    Args:
        in_features, out_features: global sizes, as of nn.Linear; they need not divide by the ranks.
        bias: whether to add a bias, cut as the output features are.
        mesh, axis: the axis of the mesh that cuts the output features.
        sequence_dim: the dim of the input (not the last) that is cut over the same axis; None if x is replicated.
        keep: `("X",)` keeps the gathered input for backward instead of gathering it again.
        reduce_dtype: in which dX is summed, e.g. torch.float32 for 16-bit parameters.
        device, dtype: of the parameters.

    Shapes: x [..., in_features] (replicated, or cut along sequence_dim) → [..., out_features / ranks].
    Source: Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    _weight, _bias = "W[m/{axis},d]", "B[m/{axis}]"

    def layout(self, dims: int) -> Layout:
        rows, cut, _ = self._letters(dims)
        return Layout(f"X[{cut}d] {self._stored['weight'].spec} -> Y[{rows}m/{self.axis}]{self._plus_bias()}")


class RowParallelLinear(_ParallelLinear):
    """A linear layer whose input features are cut over an axis: `X[n,d/tp] W[m,d/tp] -> Y[n,m] + B[m]`.

    forward: all-reduce of Y, then the bias, once; dX, dW, db: no communication. With `sequence_dim`, Y leaves cut along
    that dim (`Y[n/tp,m]`): forward reduce-scatters Y, and backward all-gathers dY once, for dX, dW and db.

    Arguments as of `ColumnParallelLinear`; the bias is replicated over the axis.

    Shapes: x [..., in_features / ranks] → [..., out_features] (replicated, or cut along sequence_dim).
    Source: Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    _weight, _bias = "W[m,d/{axis}]", "B[m]"

    def layout(self, dims: int) -> Layout:
        rows, cut, _ = self._letters(dims)
        return Layout(f"X[{rows}d/{self.axis}] {self._stored['weight'].spec} -> Y[{cut}m]{self._plus_bias()}")
