"""An embedding whose vocabulary is cut over an axis."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.adjoint import all_reduce, reduce_scatter
from shardgrad.errors import ShapeError
from shardgrad.nn import init
from shardgrad.nn.linear import sequence_letter
from shardgrad.nn.module import ShardedModule


class VocabParallelEmbedding(ShardedModule):
    """A lookup in a table whose rows are cut over an axis: the product of one-hot rows with `W[v/tp,m]`.

    Each rank looks up what it holds; the rest is zero, and the sum over the axis is the lookup (all-reduce; with
    `sequence_dim`, reduce-scatter). Backward needs no communication (with `sequence_dim`, one all-gather of dY).

    Args:
        num_embeddings, embedding_dim: global sizes, as of nn.Embedding; the vocabulary need not divide by the ranks.
        padding_idx: the id whose row starts as zeros and gets no gradient.
        mesh, axis: the axis of the mesh that cuts the vocabulary.
        sequence_dim: the dim of the *output* (not the last) to leave cut over the axis; None to leave it replicated.
        device, dtype: of the table.

    Shapes: ids [...] of integers (replicated over the axis) → [..., embedding_dim].

    Raises:
        IndexError: an id is outside the vocabulary (on CUDA: torch's device-side assertion).
    Source: Shoeybi et al. 2019, arXiv 1909.08053.
    """

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mesh, (axis,))
        if num_embeddings < 1 or embedding_dim < 1:
            raise ShapeError(f"sizes must be at least 1, not num_embeddings={num_embeddings}, {embedding_dim=}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ShapeError(f"padding_idx={padding_idx} is outside the vocabulary of {num_embeddings}")
        self.num_embeddings, self.embedding_dim, self.axis = num_embeddings, embedding_dim, axis
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.sequence_dim = sequence_dim
        self.declare("weight", f"W[v/{axis},m]", {"v": num_embeddings, "m": embedding_dim}, device, dtype)
        (self.first, _), (self.rows, _) = self._stored["weight"].block()
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Embedding's initial values: normal with standard deviation 1, zeros for padding_idx."""
        self.fill("weight", partial(init.normal, 1.0), generator)
        pad = self._local_padding()
        if pad is not None and not self.weight.is_meta:
            with torch.no_grad():
                self.weight[pad].zero_()

    def _local_padding(self) -> int | None:
        if self.padding_idx is None or not self.first <= self.padding_idx < self.first + self.rows:
            return None
        return self.padding_idx - self.first

    def forward(self, ids: Tensor) -> Tensor:
        y = self._lookup(ids)
        if self.sequence_dim is None:
            return all_reduce(y, self.mesh, self.axis)
        return reduce_scatter(y, self.mesh, self.axis, sequence_letter(y.dim(), self.sequence_dim, type(self).__name__))

    def _lookup(self, ids: Tensor) -> Tensor:
        """The rows that this rank holds, zeros for the others."""
        local = ids - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        if ids.device.type == "cpu" and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(
                    f"ids reach from {low} to {high}, outside the vocabulary of {self.num_embeddings} (0 to "
                    f"{self.num_embeddings - 1}); shape {tuple(ids.shape)}"
                )
        if self.rows == 0:
            return self.weight.new_zeros((*ids.shape, self.embedding_dim)) + self.weight.sum()
        # An id outside the whole vocabulary stays outside here, so that torch's own check on CUDA fails.
        outside = (ids < 0) | (ids >= self.num_embeddings)
        local = local.masked_fill(elsewhere & ~outside, 0).masked_fill(outside, self.rows)
        y = F.embedding(local, self.weight, self._local_padding())
        return y.masked_fill(elsewhere.unsqueeze(-1), 0)

    def extra_repr(self) -> str:
        padding = f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        sequence = f", sequence_dim={self.sequence_dim}" if self.sequence_dim is not None else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, axis={self.axis!r}{sequence}"
