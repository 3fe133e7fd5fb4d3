"""The feed-forward blocks of a transformer: their hidden features are cut over an axis and never assembled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.mesh import view
from shardgrad.errors import ShapeError
from shardgrad.layout import cost
from shardgrad.layout.batch_axis import BatchAxis, stored_over
from shardgrad.layout.layout import Layout
from shardgrad.nn import init
from shardgrad.nn.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    check_reduce,
    check_sequence_dim,
    cut_rows,
    row_letters,
)
from shardgrad.nn.module import ShardedModule
from shardgrad.ops.bound import BoundMatmul
from shardgrad.ops.matmul import bind, run


class MLP(nn.Module):
    """Y = GELU(X W_upᵀ + b_up) W_downᵀ + b_down; the hidden features are cut over an axis.

    Args:
        embed_dim, hidden_dim: global sizes; hidden_dim need not divide by the ranks.
        bias: whether both products add biases.
        mesh, axis: the axis of the mesh that cuts the hidden features.
        sequence_dim: the dim of x and y (not the last) that is cut over the same axis; None if both are replicated.
        reduce: False leaves y and dX unreduced for the caller to add to others' and to reduce once; see
            `ParallelBlock`.
        data, reduce_dtype: as of `ColumnParallelLinear`.
        device, dtype: of the parameters.

    Shapes: x [..., embed_dim] → [..., embed_dim], both replicated or both cut along sequence_dim.
    Source: Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        bias: bool = True,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        reduce: bool = True,
        data: BatchAxis | None = None,
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.reduce, self.data = axis, reduce, data
        self.up = ColumnParallelLinear(
            embed_dim,
            hidden_dim,
            bias,
            mesh=mesh,
            axis=axis,
            sequence_dim=sequence_dim,
            reduce=reduce,
            data=data,
            reduce_dtype=reduce_dtype,
            device=device,
            dtype=dtype,
        )
        self.down = RowParallelLinear(
            hidden_dim,
            embed_dim,
            bias,
            mesh=mesh,
            axis=axis,
            sequence_dim=sequence_dim,
            reduce=reduce,
            data=data,
            reduce_dtype=reduce_dtype,
            device=device,
            dtype=dtype,
        )

    @property
    def mesh(self) -> DeviceMesh:
        return self.up.mesh

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y. sequence_size: as of `ColumnParallelLinear`."""
        return self.down(F.gelu(self.up(x, sequence_size)))

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[cost.Collective]:
        """Every collective of this rank's forward and backward for x of a global shape, as `Layout.collectives`."""
        hidden = *shape[:-1], self.down.in_features
        return [*self.up.collectives(shape, dtype), *self.down.collectives(hidden, dtype)]


class _Gated(torch.autograd.Function):
    """silu(G) * U, of which backward keeps G and U; autograd's own would keep silu(G) as well."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dh * u, g), F.silu(g).mul_(dh)


class SwiGLU(ShardedModule):
    """Y = (silu(X W_gateᵀ) * X W_upᵀ) W_downᵀ, the gated feed-forward block of Llama.

        X[n,d] Wg[f/tp,d] -> G[n,f/tp]      one gather of X and one reduction of dX for both
        X[n,d] Wu[f/tp,d] -> U[n,f/tp]
        H = silu(G) * U                     local
        H[n,f/tp] Wd[m,f/tp] -> Y[n,m]

    forward: all-reduce of Y; backward: all-reduce of dX. With `sequence_dim`, X and Y are cut along it (`X[n/tp,d]`,
    `Y[n/tp,m]`): forward all-gathers X and reduce-scatters Y; backward all-gathers dY and X and reduce-scatters dX.

    Args:
        embed_dim, hidden_dim: d (and m), and f: global sizes; hidden_dim need not divide by the ranks.
        bias: whether the three products add biases.
        mesh, axis, sequence_dim, reduce, data, reduce_dtype, device, dtype: as of `MLP`.

    Parameters (global shapes): gate_weight, up_weight [f, d] and down_weight [m, f], cut by f; gate_bias, up_bias [f],
    cut, and down_bias [m], replicated.

    Shapes: x [..., embed_dim] → [..., embed_dim], both replicated or both cut along sequence_dim.

    Raises:
        ShapeError: a size is not positive, or sequence_dim is no row dim.
        LayoutError: sequence_dim is given with reduce=False.
    Source: Shazeer 2020, arXiv 2002.05202.
    """

    down_weight: Tensor
    down_bias: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        bias: bool = False,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        reduce: bool = True,
        data: BatchAxis | None = None,
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mesh, (axis,) if data is None else (axis, data.axis))
        if embed_dim < 1 or hidden_dim < 1:
            raise ShapeError(f"SwiGLU: sizes must be at least 1, not {embed_dim=}, {hidden_dim=}")
        check_sequence_dim(sequence_dim, "SwiGLU")
        check_reduce(reduce, sequence_dim, "SwiGLU")
        self.embed_dim, self.hidden_dim, self.axis = embed_dim, hidden_dim, axis
        self.sequence_dim, self.reduce, self.bias = sequence_dim, reduce, bias
        self.data, self.reduce_dtype = data, reduce_dtype
        sizes = {"d": embed_dim, "f": hidden_dim, "m": embed_dim}
        for name, weight, plus in (
            ("gate", f"Wg[f/{axis},d]", f"Bg[f/{axis}]"),
            ("up", f"Wu[f/{axis},d]", f"Bu[f/{axis}]"),
            ("down", f"Wd[m,f/{axis}]", "Bd[m]"),
        ):
            self.declare(f"{name}_weight", stored_over(data, weight, sizes), sizes, device, dtype)
            if bias:
                self.declare(f"{name}_bias", stored_over(data, plus, sizes, vector=True), sizes, device, dtype)
            else:
                self.register_parameter(f"{name}_bias", None)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Linear's initial values: uniform in ±1/√(features of the input)."""
        for name in ("gate", "up", "down"):
            values = partial(init.uniform, 1 / sqrt(self.hidden_dim if name == "down" else self.embed_dim))
            self.fill(f"{name}_weight", values, generator)
            if self.bias:
                self.fill(f"{name}_bias", values, generator)

    def layouts(self, dims: int) -> tuple[Layout, Layout, Layout]:
        """The layouts of gate, up and down for an input of so many dims."""
        rows, cut, _ = cut_rows(dims, self.sequence_dim, self.axis, self.data, "SwiGLU")
        mark = "" if self.reduce else f"{{{self.axis}}}"

        def stored(name: str) -> tuple[str, str]:
            plus = f" + {self._shardings[f'{name}_bias'].spec}" if self.bias else ""
            return str(self._shardings[f"{name}_weight"].spec), plus

        (gate, plus_gate), (up, plus_up), (down, plus_down) = (stored(name) for name in ("gate", "up", "down"))
        return (
            Layout(f"X[{cut}d]{mark} {gate} -> G[{rows}f/{self.axis}]{plus_gate}"),
            Layout(f"X[{cut}d]{mark} {up} -> U[{rows}f/{self.axis}]{plus_up}"),
            Layout(f"H[{rows}f/{self.axis}] {down} -> Y[{cut}m]{mark}{plus_down}"),
        )

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y. sequence_size: as of `ColumnParallelLinear`."""
        dims = x.dim()
        if torch.compiler.is_compiling():
            depends_on = (
                self.axis,
                self.sequence_dim,
                self.reduce,
                self.bias,
                str(self.data),
                self.reduce_dtype,
                self.mesh,
            )
            ins, out = self._bound((dims, "in"), *depends_on), self._bound((dims, "out"), *depends_on)
        else:
            ins = self._products.get((dims, "in")) or self._bind((dims, "in"))
            out = self._products[dims, "out"]
        known: dict[str, int] = {}
        if sequence_size is not None and self.sequence_dim is not None:
            letter = cut_rows(dims, self.sequence_dim, self.axis, self.data, "SwiGLU")[2]
            known = {letter: sequence_size} if letter else {}
        weights = [self.get_parameter("gate_weight"), self.get_parameter("up_weight")]
        biases = [self.get_parameter("gate_bias"), self.get_parameter("up_bias")] if self.bias else []
        sizes = {"d": self.embed_dim, "f": self.hidden_dim}
        g, u = run(ins, x, weights, biases, {**sizes, **known})
        hidden = F.silu(g) * u if torch.compiler.is_compiling() else _Gated.apply(g, u)
        down_bias = [] if self.down_bias is None else [self.down_bias]
        sizes = {"f": self.hidden_dim, "m": self.embed_dim}
        return run(out, hidden, [self.down_weight], down_bias, {**sizes, **known})[0]

    def _bind(self, key: tuple[int, str]) -> BoundMatmul:
        dims = key[0]
        gate, up, down = self.layouts(dims)
        self._products[dims, "in"] = bind((gate, up), (self.bias,) * 2, self.mesh, (), self.reduce_dtype)
        self._products[dims, "out"] = bind((down,), (self.bias,), self.mesh, (), self.reduce_dtype)
        return self._products[key]

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[cost.Collective]:
        """Every collective of this rank's forward and backward for x of a global shape, as `Layout.collectives`."""
        mesh_view = view(self.mesh)
        gate, _, down = self.layouts(len(shape))
        rows = dict(zip(row_letters(len(shape) - 1), shape))
        features = {"d": self.embed_dim, "f": self.hidden_dim}
        sizes = gate.resolve({**rows, **features}, mesh_view.shape, mesh_view.coordinate)
        shared = self._bind((len(shape), "in")).collectives(sizes, dtype)
        features = {"f": self.hidden_dim, "m": self.embed_dim}
        last = down.collectives(
            {**rows, **features},
            mesh_view.shape,
            dtype,
            reduce_dtype=self.reduce_dtype,
            coordinate=mesh_view.coordinate,
        )
        return [*shared, *last]

    def extra_repr(self) -> str:
        flags = ", bias=True" if self.bias else ""
        flags += "" if self.sequence_dim is None else f", sequence_dim={self.sequence_dim}"
        flags += "" if self.reduce else ", reduce=False"
        return f"embed_dim={self.embed_dim}, hidden_dim={self.hidden_dim}, axis={self.axis!r}{flags}"
