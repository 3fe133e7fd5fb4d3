"""Learned positions, also where the sequence is cut. (Rotary ones need no parameters: `rotary`.)"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.adjoint import slice_replicated
from shardgrad.comm.mesh import view
from shardgrad.errors import ShapeError
from shardgrad.layout import cost
from shardgrad.layout.batch_axis import BatchAxis, stored_over
from shardgrad.layout.notation import Dim
from shardgrad.layout.plan import route
from shardgrad.layout.sizes import Sizes
from shardgrad.nn import init
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.rows import for_rows, for_rows_collectives


class LearnedPositions(ShardedModule):
    """A table `W[s,m]`, replicated, of which each rank adds the rows of its part of the sequence to x [b, s/tp, m].

    Every rank has the whole batch at its positions, so the gradient of its rows is complete: the table's is the ranks'
    rows gathered (the adjoint of a slice that is stored cut), and nothing is summed. Where x is replicated, nothing
    moves at all.

    Args:
        num_positions, embed_dim: of the table, as of nn.Embedding.
        mesh, axis: the axis of the mesh.
        sequence_dim: 1 if x [b, s, m] is cut along the sequence over the axis; None if it is replicated.
        data: the axis that cuts the batch of x, and how the table is stored over it; None without data parallelism.
        device, dtype: of the table.

    Raises:
        ShapeError: a size is not positive, or sequence_dim is neither None nor 1.
    """

    weight: Tensor

    def __init__(
        self,
        num_positions: int,
        embed_dim: int,
        *,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        data: BatchAxis | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mesh, (axis,) if data is None else (axis, data.axis))
        if num_positions < 1 or embed_dim < 1:
            raise ShapeError(f"LearnedPositions: sizes must be at least 1, not {num_positions=}, {embed_dim=}")
        if sequence_dim not in (None, 1):
            raise ShapeError(f"LearnedPositions: x is [b, s, m], so sequence_dim is 1 or None, not {sequence_dim}")
        self.num_positions, self.embed_dim, self.axis = num_positions, embed_dim, axis
        self.sequence_dim, self.data = sequence_dim, data
        sizes = {"s": num_positions, "m": embed_dim}
        self.declare("weight", stored_over(data, "W[s,m]", sizes), sizes, device, dtype)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Embedding's initial values: normal with standard deviation 1."""
        self.fill("weight", partial(init.normal, 1.0), generator)

    def forward(self, sequence: int, first: int = 0) -> Tensor:
        """The rows to add to x: of this rank's part of `sequence` positions, the first of which is `first`.

        Shapes: [s/tp, m], or [s, m] without sequence_dim.

        Raises:
            ShapeError: the table has no such positions.
        """
        if first < 0 or sequence < 0 or first + sequence > self.num_positions:
            raise ShapeError(
                f"positions {first} to {first + sequence - 1} were asked for, of {self.num_positions} (num_positions)"
            )
        weight = (
            self.weight if self.data is None else for_rows(self.weight, self._shardings["weight"], (self.data.axis,))
        )
        rows = weight[first : first + sequence]
        return rows if self.sequence_dim is None else slice_replicated(rows, self.mesh, self.axis, dim=0)

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[cost.Collective]:
        """Every collective of this rank's forward and backward for x of global shape [b, s, m], whatever its dtype: the
        table travels in its own."""
        own: Any = self.weight.dtype
        table = (
            [] if self.data is None else list(for_rows_collectives(self._shardings["weight"], (self.data.axis,), own))
        )
        if self.sequence_dim is None:
            return table
        mesh_view, width = view(self.mesh), cost.itemsize(own)
        sizes = Sizes(mesh_view.shape, mesh_view.coordinate, {("s", ()): shape[1], ("m", ()): self.embed_dim})
        moves = route((Dim("s", (self.axis,)), Dim("m")), (Dim("s"), Dim("m")))
        return [*table, *cost.moved("dW", "dW", moves, sizes, width, width)]

    def extra_repr(self) -> str:
        sequence = f", sequence_dim={self.sequence_dim}" if self.sequence_dim is not None else ""
        return f"{self.num_positions}, {self.embed_dim}, axis={self.axis!r}{sequence}"
