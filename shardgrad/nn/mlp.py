"""The feed-forward block of a transformer: column parallel, GELU, row parallel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.nn.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """Y = GELU(X W_upᵀ + b_up) W_downᵀ + b_down; the hidden features are cut over an axis and never assembled.

    Args:
        embed_dim, hidden_dim: global sizes; hidden_dim need not divide by the ranks.
        mesh, axis: the axis of the mesh that cuts the hidden features.
        sequence_dim: the dim of x and y (not the last) that is cut over the same axis; None if both are replicated.
        device, dtype: of the parameters.

    Shapes: x [..., embed_dim] → [..., embed_dim], both replicated or both cut along sequence_dim.
    Source: Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(
            embed_dim, hidden_dim, mesh=mesh, axis=axis, sequence_dim=sequence_dim, device=device, dtype=dtype
        )
        self.down = RowParallelLinear(
            hidden_dim, embed_dim, mesh=mesh, axis=axis, sequence_dim=sequence_dim, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y. sequence_size: as of `ColumnParallelLinear`."""
        return self.down(F.gelu(self.up(x, sequence_size)))
