"""A transformer's block, with and without sequence parallelism."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.layout.cost import Collective
from shardgrad.nn.attention import Attention
from shardgrad.nn.mlp import MLP
from shardgrad.nn.norm import LayerNorm


class Block(nn.Module):
    """X + Attention(norm(X)), then X + MLP(norm(X)), as GPT-2's; hidden features are four times d.

    X is [b, s/tp, d], or [b, s, d] without sequence parallelism.
    """

    def __init__(self, d: int, heads: int, *, mesh: DeviceMesh, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        dim = 1 if sequence_parallel else None
        self.d, self.sequence_dim = d, dim
        self.attention_norm = LayerNorm(d, mesh=mesh, sequence_dim=dim, dtype=dtype)
        self.attention = Attention(d, heads, mesh=mesh, sequence_dim=dim, dtype=dtype)
        self.mlp_norm = LayerNorm(d, mesh=mesh, sequence_dim=dim, dtype=dtype)
        self.mlp = MLP(d, 4 * d, mesh=mesh, sequence_dim=dim, dtype=dtype)

    def forward(self, x: Tensor, sequence: int) -> Tensor:
        known = sequence if self.sequence_dim is not None else None
        x = x + self.attention(self.attention_norm(x), known)
        return x + self.mlp(self.mlp_norm(x), known)

    def collectives(self, batch: int, sequence: int, dtype: torch.dtype) -> list[Collective]:
        """Every collective of this rank's forward and backward."""
        shape = (batch, sequence, self.d)
        norms = [*self.attention_norm.collectives(shape, dtype), *self.mlp_norm.collectives(shape, dtype)]
        return [*self.attention.collectives(batch, sequence, dtype), *self.mlp.collectives(shape, dtype), *norms]


def flops(batch: int, sequence: int, d: int) -> float:
    """Of forward and backward on all ranks together: the products with weights, and attention over whole sequences."""
    return 6 * 12 * d * d * batch * sequence + 12 * batch * sequence * sequence * d
