"""Attention and feed-forward side by side: one gather and one reduction for both, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from shardgrad.arguments import TellingType, told
from shardgrad.comm.adjoint import all_gather, all_reduce, reduce_scatter, replicate
from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.cost import Collective
from shardgrad.layout.notation import parse
from shardgrad.nn.attention import Attention
from shardgrad.nn.mlp import MLP, SwiGLU
from shardgrad.nn.norm import LayerNorm, RMSNorm
from shardgrad.nn.template import Rows
from shardgrad.nn.transfer import transfer


class ParallelBlock(nn.Module, metaclass=TellingType):
    """Y = X + Attention(N) + MLP(N), N = norm(X), as in GPT-J and PaLM.

        N[b,s,d]{tp} W… -> …                 each layer leaves its dN unreduced,
        A W… -> Y[b,s,m]{tp}                 and its Y: each of reduce=False

    forward: all-reduce of Attention(N) + MLP(N), once; backward: all-reduce of the sum of both dN, once: half of what
    the two in sequence need. With X sharded along s: forward all-gathers N and reduce-scatters the sum; backward
    all-gathers dY and reduce-scatters dN, each once. N is kept as gathered from forward to backward.

    Args:
        norm: of X; its sequence_dim, 1 or None, says whether X and Y are sharded along the sequence.
        attention, mlp: with reduce=False, over the norm's axis and with its `data`.

    Raises:
        LayoutError: one of them reduces by itself, or the three are over different axes, of the mesh or of the data.
        ShapeError: sequence_dim is neither None nor 1.
    Source: Wang & Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022, arXiv 2204.02311.
    """

    def __init__(self, norm: LayerNorm | RMSNorm, attention: Attention, mlp: MLP | SwiGLU) -> None:
        super().__init__()
        for name, layer in (("attention", attention), ("mlp", mlp)):
            if layer.reduce:
                raise LayoutError(f"ParallelBlock reduces once for both: build {name} with reduce=False")
            if view(layer.mesh).axes.get(layer.axis) != view(norm.mesh).axis(norm.axis):
                raise LayoutError(f"ParallelBlock: norm is over axis {norm.axis!r}, {name} over {layer.axis!r}")
            if layer.data != norm.data:
                raise LayoutError(f"ParallelBlock: norm has data={norm.data}, {name} data={layer.data}: give them one")
        if norm.sequence_dim not in (None, 1):
            raise ShapeError(
                f"ParallelBlock: x is [b, s, d], so sequence_dim of its norm is 1 or None, not {norm.sequence_dim}"
            )
        self.norm, self.attention, self.mlp = norm, attention, mlp

    @told
    def forward(
        self, x: Tensor, sequence_size: int | None = None, *, mask: Tensor | None = None, positions: Tensor | int = 0
    ) -> Tensor:
        """The local shard of Y: x [b, s/tp, d] → [b, s/tp, d]. Arguments as of `Attention`."""
        mesh, axis = self.norm.mesh, self.norm.axis
        n = self.norm(x)
        if self.norm.sequence_dim is None:
            n = replicate(n, mesh, axis)
        else:
            n = all_gather(n, mesh, axis, 1, size=sequence_size)
        term = self.attention(n, mask=mask, positions=positions) + self.mlp(n)
        if self.norm.sequence_dim is None:
            return x + all_reduce(term, mesh, axis)
        return x + reduce_scatter(term, mesh, axis, 1)

    def collectives(self, batch: int, sequence: int, dtype: Any = "float32") -> list[Collective]:
        """Every collective of this rank's forward and backward for x [batch, sequence, d], as `Layout.collectives`."""
        norm, shape = self.norm, (batch, sequence, self.attention.embed_dim)
        notation = parse("N[b,s/sp,d] W[m,d] -> Y[b,s/sp,m]")  # W stands for any
        rows = Rows.of(notation, 0, norm.parallel, "ParallelBlock")
        stored = rows.stored(notation.lhs, norm.axis)
        whole = replace(rows, sequence=None).stored(notation.lhs, norm.axis)
        sizes, over = norm.resolve(dict(zip("bsd", shape))), (norm.axis,)
        return [
            *transfer("forward", "N", stored, whole, sizes, dtype),
            *transfer("forward", "Y", whole, stored, sizes, dtype, over),
            *transfer("dN", "dY", stored, whole, sizes, dtype),
            *transfer("dN", "dN", whole, stored, sizes, dtype, over),
            *self.norm.collectives(shape, dtype),
            *self.attention.collectives(batch, sequence, dtype),
            *self.mlp.collectives(shape, dtype),
        ]
