"""Column and row parallel linear layers: torch's weight `[out, in]`, one of its dims sharded over an axis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self, Unpack

from torch import Tensor, nn

from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.layout.sizes import Sizes
from shardgrad.nn.layer import OneProduct
from shardgrad.nn.parallel import Where

if TYPE_CHECKING:
    from shardgrad.layout.cost import Collective


class _ParallelLinear(OneProduct):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        wraps: bool,
        reduce: bool,
        save_gathered: Collection[str],
        where: Mapping[str, Any],
    ) -> None:
        user = type(self).__name__
        if isinstance(save_gathered, str) or not set(save_gathered) <= {"X", "W"}:
            raise LayoutError(
                f"{user}: save_gathered names operands, as save_gathered=('X',), of X and W; not {save_gathered!r}"
            )
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ShapeError(f"{user}: {name} must be at least 1, not {size}")
        super().__init__(where, reduce=reduce, save_gathered=tuple(save_gathered))
        self.in_features, self.out_features, self.wraps = in_features, out_features, wraps
        self.build({"d": in_features, "m": out_features}, bias=bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> Self:
        """A layer with the weight and bias of an nn.Linear, alike on every rank, of which each rank takes its part.

        Args:
            kwargs: of the constructor, but the sizes and bias.
        """
        sizes = linear.in_features, linear.out_features
        tensors = {"weight": linear.weight, "bias": linear.bias}
        return cls.from_tensors(tensors, *sizes, linear.bias is not None, **kwargs)

    def layout(self, dims: int) -> Layout:
        """The layout of this layer's product for an input of so many dims."""
        return self.layouts(dims)[0]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._flags()}"
        )


class ColumnParallelLinear(_ParallelLinear, layout="X[n/sp,d] W[m/tp,d] -> Y[n,m/tp] + B[m/tp]"):
    """A linear layer whose output features are sharded over an axis.

    With `sequence_dim`, x is gathered again for dW unless `save_gathered=("X",)`.

    Args:
        in_features, out_features: global sizes, as of nn.Linear; they need not divide by the ranks.
        bias: whether to add a bias, sharded as the output features are.
        gather_output: whether y leaves whole on every rank (all-gather; of dY, which is then whole on every rank as
            well, each rank takes its slice). As Megatron's.
        reduce: False leaves dX unreduced (`X[n,d]{tp}`), for several layers that share an input: pass it through
            `sg.replicate`, or make it by `sg.all_gather`, which sum the gradients of all of them once.
        save_gathered: `("X",)` keeps the gathered input for backward instead of gathering it again.
        parallel, or mesh, axis, sequence_dim, data, reduce_dtype, device, dtype: as of `Parallel`.

    Shapes: x [..., in_features] (replicated, or sharded along sequence_dim) → [..., out_features / ranks], or
    [..., out_features] with gather_output.

    Raises:
        ShapeError: a size is not positive, or sequence_dim is no row dim.
        LayoutError: save_gathered names no operand, or sequence_dim is given with reduce=False.
    Source: Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gather_output: bool = False,
        reduce: bool = True,
        save_gathered: Collection[str] = (),
        **where: Unpack[Where],
    ) -> None:
        super().__init__(in_features, out_features, bias, gather_output, reduce, save_gathered, where)

    @property
    def gather_output(self) -> bool:
        return self.wraps

    def leave(self, y: Tensor) -> Tensor:
        from shardgrad.comm.adjoint import gather_replicated

        return gather_replicated(y, self.mesh, self.axis, -1, size=self.out_features)

    def transfers(self, sizes: Sizes, dims: int, dtype: Any) -> Iterable[Collective]:
        from shardgrad.nn.transfer import transfer, whole

        y = self.layout(dims).out
        return transfer("forward", "Y", y, whole(y, "m"), sizes, dtype) if self.wraps else ()


class RowParallelLinear(_ParallelLinear, layout="X[n,d/tp] W[m,d/tp] -> Y[n/sp,m] + B[m]"):
    """A linear layer whose input features are sharded over an axis.

    The bias is replicated, and added once, after the reduction. With `sequence_dim`, backward gathers dY once, for dX,
    dW and db.

    Arguments as of `ColumnParallelLinear`, but:
        input_is_parallel: False if x comes whole on every rank (along the sequence too): each rank takes its slice of
            the features, and dX is all-gathered. As Megatron's.
        reduce: False leaves y unreduced (`Y[n,m]{tp}`): each rank's is one term of the sum (the bias in the first
            rank's), for the caller to add to others and to reduce by `sg.all_reduce` or `sg.reduce_scatter`.

    Shapes: x [..., in_features / ranks] → [..., out_features] (replicated, or sharded along sequence_dim).
    Source: Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        input_is_parallel: bool = True,
        reduce: bool = True,
        save_gathered: Collection[str] = (),
        **where: Unpack[Where],
    ) -> None:
        super().__init__(in_features, out_features, bias, not input_is_parallel, reduce, save_gathered, where)

    @property
    def input_is_parallel(self) -> bool:
        return not self.wraps

    def enter(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(
                f"RowParallelLinear(input_is_parallel=False) takes x whole, [..., {self.in_features}], not "
                f"{tuple(x.shape)}"
            )
        from shardgrad.comm.adjoint import slice_replicated

        return slice_replicated(x, self.mesh, self.axis, -1)

    def transfers(self, sizes: Sizes, dims: int, dtype: Any) -> Iterable[Collective]:
        from shardgrad.nn.transfer import transfer, whole

        x = self.layout(dims).lhs
        return transfer("dX", "dX", x, whole(x, "d"), sizes, dtype) if self.wraps else ()
