"""Column and row parallel linear layers: torch's weight `[out, in]`, one of its dims cut over an axis."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.adjoint import gather_replicated, slice_replicated
from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout import cost
from shardgrad.layout.batch_axis import BatchAxis, rows_over, stored_over
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import Dim, TensorSpec
from shardgrad.layout.plan import route
from shardgrad.nn import init
from shardgrad.nn.module import ShardedModule
from shardgrad.ops.bound import BoundMatmul
from shardgrad.ops.matmul import bind, run

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


def cut_rows(
    dims: int, sequence_dim: int | None, axis: str, data: BatchAxis | None, who: str
) -> tuple[str, str, str | None]:
    """For a tensor of `dims` dims: its row letters, without and with the sequence cut, and the sequence's letter. The
    first row letter is cut by the data parallel axis, if there is one, in either case.

    Raises:
        ShapeError: as `sequence_letter`, or there is no row that the data parallel axis could cut.
    """
    letters = row_letters(dims - 1)
    if data is not None and not letters:
        raise ShapeError(f"{who}: an input of one dim has no batch that {data.axis} could cut")
    rows = [rows_over(data, letter) if at == 0 else letter for at, letter in enumerate(letters)]
    uncut = "".join(f"{letter}," for letter in rows)
    if sequence_dim is None:
        return uncut, uncut, None
    at = sequence_letter(dims, sequence_dim, who)
    cut = "".join(f"{x}/{axis}," if i == at else f"{x}," for i, x in enumerate(rows))
    return uncut, cut, letters[at]


def check_sequence_dim(sequence_dim: object, who: str) -> None:
    """Refuse what is the row dim of no input.

    Raises:
        ShapeError: sequence_dim is neither None nor an integer, or -1.
    """
    if sequence_dim is None:
        return
    if not isinstance(sequence_dim, int) or isinstance(sequence_dim, bool):
        raise ShapeError(f"{who}: sequence_dim is the number of a dim, or None; not {sequence_dim!r}")
    if sequence_dim == -1:
        raise ShapeError(f"{who}: sequence_dim=-1 is not a row dim (the last one holds features)")


def check_reduce(reduce: bool, sequence_dim: int | None, who: str) -> None:
    """Refuse a layer that would leave its sums to the caller and yet take or leave shards of the sequence.

    Raises:
        LayoutError: both are asked for.
    """
    if not reduce and sequence_dim is not None:
        raise LayoutError(
            f"{who}: with reduce=False the caller gathers x and reduces y (sg.all_gather, sg.reduce_scatter along the "
            f"sequence), and the layer sees whole sequences: leave out sequence_dim={sequence_dim}"
        )


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
        bias: bool,
        mesh: DeviceMesh,
        axis: str,
        sequence_dim: int | None,
        reduce: bool,
        save_gathered: Collection[str],
        data: BatchAxis | None,
        reduce_dtype: torch.dtype | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(mesh, (axis,) if data is None else (axis, data.axis))
        who = type(self).__name__
        check_sequence_dim(sequence_dim, who)
        check_reduce(reduce, sequence_dim, who)
        if isinstance(save_gathered, str) or not set(save_gathered) <= {"X", "W"}:
            raise LayoutError(
                f"{who}: save_gathered names operands, as save_gathered=('X',), of X and W; not {save_gathered!r}"
            )
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ShapeError(f"{who}: {name} must be at least 1, not {size}")
        self.in_features, self.out_features, self.axis = in_features, out_features, axis
        self.sequence_dim, self.reduce = sequence_dim, reduce
        self.save_gathered, self.data, self.reduce_dtype = tuple(save_gathered), data, reduce_dtype
        self._sizes = {"d": in_features, "m": out_features}
        self._given = tuple(self._sizes.items())
        weight = stored_over(data, self._weight.format(axis=axis), self._sizes)
        self.declare("weight", weight, self._sizes, device, dtype)
        if bias:
            added = stored_over(data, self._bias.format(axis=axis), self._sizes, vector=True)
            self.declare("bias", added, self._sizes, device, dtype)
        else:
            self.register_parameter("bias", None)
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
        return f" + {self._shardings['bias'].spec}" if self.bias is not None else ""

    def _letters(self, dims: int) -> tuple[str, str, str | None]:
        return cut_rows(dims, self.sequence_dim, self.axis, self.data, type(self).__name__)

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y.

        Args:
            x: [..., in_features], stored as `self.layout(x.dim())["X"]`.
            sequence_size: the size of the sequence dim over all ranks. Only of use to a column parallel layer with
                `sequence_dim`, whose ranks otherwise exchange it at every call (one small exchange).

        Raises:
            ShapeError: x does not fit; see `matmul` for the rest.
        """
        parameters = self._parameters
        plain = "weight" in parameters and "bias" in parameters  # not parametrized: found at once
        weight: Any = parameters["weight"] if plain else self.weight
        bias: Any = parameters["bias"] if plain else self.bias
        key = x.dim(), bias is None
        sizes = self._given
        if sequence_size is not None and self.sequence_dim is not None:
            sizes = (*sizes, (str(self._letters(x.dim())[2]), sequence_size))
        if torch.compiler.is_compiling():
            depends_on = self.axis, self.sequence_dim, self.reduce, self.save_gathered
            product = self._bound(key, *depends_on, str(self.data), self.reduce_dtype, self.mesh)
            return run(product, x, (weight,), () if bias is None else (bias,), dict(sizes))[0]
        product = self._products.get(key) or self._bind(key)
        return product((x, weight) if bias is None else (x, weight, bias), sizes)

    def _bind(self, key: tuple[int, bool]) -> BoundMatmul:
        dims, _ = key
        if dims == 0:
            raise ShapeError(f"{type(self).__name__} needs an input of at least one dim, got a scalar")
        product = bind((self.layout(dims),), (self.bias is not None,), self.mesh, self.save_gathered, self.reduce_dtype)
        self._products[key] = product
        return product

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[cost.Collective]:
        """Every collective of this rank's forward and backward, as `Layout.collectives`.

        Args:
            shape: the global shape of x, [..., in_features].
            dtype: of x and the parameters.
        """
        mesh_view, layout = view(self.mesh), self.layout(len(shape))
        return layout.collectives(
            self._all_sizes(shape),
            mesh_view.shape,
            dtype,
            save_gathered=self.save_gathered,
            reduce_dtype=self.reduce_dtype,
            coordinate=mesh_view.coordinate,
        )

    def _all_sizes(self, shape: Sequence[int]) -> dict[str, int]:
        if not shape or shape[-1] != self.in_features:
            raise ShapeError(f"x has global shape [..., {self.in_features}], not {tuple(shape)}")
        return {**self._sizes, **dict(zip(row_letters(len(shape) - 1), shape))}

    def _moved(
        self, phase: str, name: str, spec: TensorSpec, shape: Sequence[int], dtype: Any
    ) -> list[cost.Collective]:
        """What it takes to gather X, Y or its gradient whole."""
        mesh_view, width = view(self.mesh), cost.itemsize(dtype)
        sizes = self.layout(len(shape)).resolve(self._all_sizes(shape), mesh_view.shape, mesh_view.coordinate)
        whole = tuple(Dim(dim.letter, ()) if dim is spec.dims[-1] else dim for dim in spec.dims)
        return list(cost.moved(phase, name, route(spec.dims, whole), sizes, width, width))

    def extra_repr(self) -> str:
        flags = f", sequence_dim={self.sequence_dim}" if self.sequence_dim is not None else ""
        flags += "" if self.reduce else ", reduce=False"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"axis={self.axis!r}{flags}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer whose output features are cut over an axis: `X[n,d] W[m/tp,d] -> Y[n,m/tp] + B[m/tp]`.

    forward: no communication; dX: all-reduce; dW, db: none. With `sequence_dim`, x arrives cut along that dim
    (`X[n/tp,d]`): forward all-gathers x, dX is reduce-scattered, and dW gathers x again unless `save_gathered=("X",)`.

    Args:
        in_features, out_features: global sizes, as of nn.Linear; they need not divide by the ranks.
        bias: whether to add a bias, cut as the output features are.
        mesh, axis: the axis of the mesh that cuts the output features.
        gather_output: whether y leaves whole on every rank (all-gather; of dY, which is then whole on every rank as
            well, each rank takes its slice). As Megatron's.
        sequence_dim: the dim of the input (not the last) that is cut over the same axis; None if x is replicated.
        reduce: False leaves dX unreduced (`X[n,d]{tp}`), for several layers that share an input: pass it through
            `sg.replicate`, or make it by `sg.all_gather`, which sum the gradients of all of them once.
        save_gathered: `("X",)` keeps the gathered input for backward instead of gathering it again.
        data: the axis that cuts the batch, the input's first dim, and how parameters are stored over it; None without
            data parallelism.
        reduce_dtype: in which y, dX and gradients are summed, e.g. torch.float32 for 16-bit parameters.
        device, dtype: of the parameters.

    Shapes: x [..., in_features] (replicated, or cut along sequence_dim) → [..., out_features / ranks], or
    [..., out_features] with gather_output.

    Raises:
        ShapeError: a size is not positive, or sequence_dim is no row dim.
        LayoutError: save_gathered names no operand, or sequence_dim is given with reduce=False.
    Source: Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    _weight, _bias = "W[m/{axis},d]", "B[m/{axis}]"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        axis: str = "tp",
        gather_output: bool = False,
        sequence_dim: int | None = None,
        reduce: bool = True,
        save_gathered: Collection[str] = (),
        data: BatchAxis | None = None,
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = in_features, out_features
        super().__init__(
            *sizes, bias, mesh, axis, sequence_dim, reduce, save_gathered, data, reduce_dtype, device, dtype
        )
        self.gather_output = gather_output

    def layout(self, dims: int) -> Layout:
        """The layout of this layer's product for an input of so many dims."""
        rows, cut, _ = self._letters(dims)
        mark = "" if self.reduce else f"{{{self.axis}}}"
        return Layout(f"X[{cut}d]{mark} {self._shardings['weight'].spec} -> Y[{rows}m/{self.axis}]{self._plus_bias()}")

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        y = super().forward(x, sequence_size)
        return gather_replicated(y, self.mesh, self.axis, -1, size=self.out_features) if self.gather_output else y

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[cost.Collective]:
        found = super().collectives(shape, dtype)
        if self.gather_output:
            found += self._moved("forward", "Y", self.layout(len(shape)).out, shape, dtype)
        return found


class RowParallelLinear(_ParallelLinear):
    """A linear layer whose input features are cut over an axis: `X[n,d/tp] W[m,d/tp] -> Y[n,m] + B[m]`.

    forward: all-reduce of Y, then the bias, once; dX, dW, db: no communication. With `sequence_dim`, Y leaves cut along
    that dim (`Y[n/tp,m]`): forward reduce-scatters Y, and backward all-gathers dY once, for dX, dW and db.

    Arguments as of `ColumnParallelLinear`, but:
        input_is_parallel: False if x comes whole on every rank (along the sequence too): each rank takes its slice of
            the features, and dX is all-gathered. As Megatron's.
        reduce: False leaves y unreduced (`Y[n,m]{tp}`): each rank's is one term of the sum (the bias in the first
            rank's), for the caller to add to others and to reduce by `sg.all_reduce` or `sg.reduce_scatter`.

    The bias is replicated over the axis.

    Shapes: x [..., in_features / ranks] → [..., out_features] (replicated, or cut along sequence_dim).
    Source: Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    _weight, _bias = "W[m,d/{axis}]", "B[m]"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        axis: str = "tp",
        input_is_parallel: bool = True,
        sequence_dim: int | None = None,
        reduce: bool = True,
        save_gathered: Collection[str] = (),
        data: BatchAxis | None = None,
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = in_features, out_features
        super().__init__(
            *sizes, bias, mesh, axis, sequence_dim, reduce, save_gathered, data, reduce_dtype, device, dtype
        )
        self.input_is_parallel = input_is_parallel

    def layout(self, dims: int) -> Layout:
        """The layout of this layer's product for an input of so many dims."""
        rows, cut, _ = self._letters(dims)
        mark = "" if self.reduce else f"{{{self.axis}}}"
        return Layout(f"X[{rows}d/{self.axis}] {self._shardings['weight'].spec} -> Y[{cut}m]{mark}{self._plus_bias()}")

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        if not self.input_is_parallel:
            if x.dim() == 0 or x.shape[-1] != self.in_features:
                raise ShapeError(
                    f"RowParallelLinear(input_is_parallel=False) takes x whole, [..., {self.in_features}], not "
                    f"{tuple(x.shape)}"
                )
            x = slice_replicated(x, self.mesh, self.axis, -1)
        return super().forward(x, sequence_size)

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[cost.Collective]:
        found = super().collectives(shape, dtype)
        if not self.input_is_parallel:
            found += self._moved("dX", "dX", self.layout(len(shape)).lhs, shape, dtype)
        return found
