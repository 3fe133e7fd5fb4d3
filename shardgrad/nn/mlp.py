"""The feed-forward blocks of a transformer: their hidden features are sharded over an axis and never assembled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import TellingType
from shardgrad.comm import shim
from shardgrad.errors import ShapeError
from shardgrad.layout.batch_axis import BatchAxis
from shardgrad.layout.cost import Collective
from shardgrad.nn.layer import Layer
from shardgrad.nn.linear import ColumnParallelLinear, RowParallelLinear
from shardgrad.nn.parallel import Parallel, Where
from shardgrad.nn.pieces import Cut, in_pieces, rows_of


class MLP(nn.Module, metaclass=TellingType):
    """Y = GELU(X W_upᵀ + b_up) W_downᵀ + b_down: a `ColumnParallelLinear`, GELU, a `RowParallelLinear`.

    The hidden features are sharded over an axis, and never assembled.

    Args:
        embed_dim, hidden_dim: global sizes; hidden_dim need not divide by the ranks.
        bias: whether both products add biases.
        reduce: False leaves y and dX unreduced for the caller to add to others' and to reduce once; see
            `ParallelBlock`.
        parallel, or mesh, axis, sequence_dim, data, reduce_dtype, device, dtype: as of `Parallel`.

    Shapes: x [..., embed_dim] → [..., embed_dim], both replicated or both sharded along sequence_dim.
    Source: Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    def __init__(
        self, embed_dim: int, hidden_dim: int, *, bias: bool = True, reduce: bool = True, **where: Unpack[Where]
    ) -> None:
        super().__init__()
        parallel = Parallel.of("MLP", where, Where)
        self.up = ColumnParallelLinear(embed_dim, hidden_dim, bias, reduce=reduce, parallel=parallel)
        self.down = RowParallelLinear(hidden_dim, embed_dim, bias, reduce=reduce, parallel=parallel)

    @property
    def mesh(self) -> DeviceMesh:
        return self.up.mesh

    @property
    def axis(self) -> str:
        return self.up.axis

    @property
    def data(self) -> BatchAxis | None:
        return self.up.data

    @property
    def reduce(self) -> bool:
        return self.up.reduce

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y. sequence_size: as of `ColumnParallelLinear`."""
        h = self.up(x, sequence_size)
        return self.down(in_pieces(F.gelu, self.mesh, _hidden(self, h), h))

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[Collective]:
        """Every collective of this rank's forward and backward for x of a global shape, as `Layout.collectives`."""
        hidden = *shape[:-1], self.down.in_features
        return [*self.up.collectives(shape, dtype), *self.down.collectives(hidden, dtype)]


def _hidden(layer: MLP | SwiGLU, h: Tensor) -> Cut:
    """The dims of hidden features, [..., f/tp], that axes shard."""
    return [*rows_of(layer.data), (h.dim() - 1, [layer.axis])]


class _Gated(torch.autograd.Function):
    """silu(G) * U, of which backward keeps G and U; autograd's own would keep silu(G) as well."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradients is wanted
            dg, du = torch.autograd.grad(F.silu(g) * u, (g, u), dh, create_graph=True)
            return dg, du
        return torch.ops.aten.silu_backward(dh * u, g), F.silu(g).mul_(dh)


class SwiGLU(
    Layer,
    layouts={
        "gate": "X[n/sp,d] Wg[f/tp,d] -> G[n,f/tp] + Bg[f/tp]",
        "up": "X[n/sp,d] Wu[f/tp,d] -> U[n,f/tp] + Bu[f/tp]",
        "down": "H[n,f/tp] Wd[m,f/tp] -> Y[n/sp,m] + Bd[m]",
    },
):
    """Y = (silu(X W_gateᵀ) * X W_upᵀ) W_downᵀ, the gated feed-forward block of Llama; H = silu(G) * U is local.

    Args:
        embed_dim, hidden_dim: d (and m), and f: global sizes; hidden_dim need not divide by the ranks.
        bias: whether the three products add biases.
        reduce: as of `MLP`.
        parallel, or mesh, axis, sequence_dim, data, reduce_dtype, device, dtype: as of `Parallel`.

    Parameters (global shapes): gate_weight, up_weight [f, d] and down_weight [m, f], sharded by f; gate_bias, up_bias
    [f], sharded, and down_bias [m], replicated.

    Shapes: x [..., embed_dim] → [..., embed_dim], both replicated or both sharded along sequence_dim.

    Raises:
        ShapeError: a size is not positive, or sequence_dim is no row dim.
        LayoutError: sequence_dim is given with reduce=False.
    Source: Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(
        self, embed_dim: int, hidden_dim: int, *, bias: bool = False, reduce: bool = True, **where: Unpack[Where]
    ) -> None:
        super().__init__(where, reduce=reduce)
        if embed_dim < 1 or hidden_dim < 1:
            raise ShapeError(f"SwiGLU: sizes must be at least 1, not {embed_dim=}, {hidden_dim=}")
        self.embed_dim, self.hidden_dim, self.bias = embed_dim, hidden_dim, bias
        self.build({"d": embed_dim, "f": hidden_dim, "m": embed_dim}, bias=bias)

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y. sequence_size: as of `ColumnParallelLinear`."""
        g, u = self.multiply("X", x, sequence_size)
        if self.compiling() or shim.beyond_backward():
            h = F.silu(g) * u
        else:
            h = in_pieces(_Gated.apply, self.mesh, _hidden(self, g), g, u)
        return self.multiply("H", h, sequence_size)[0]

    def extra_repr(self) -> str:
        flags = ", bias=True" if self.bias else ""
        return f"embed_dim={self.embed_dim}, hidden_dim={self.hidden_dim}{flags}, {self._flags()}"
