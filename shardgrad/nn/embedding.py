"""An embedding whose vocabulary is cut over an axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.adjoint import all_reduce, reduce_scatter
from shardgrad.comm.mesh import view
from shardgrad.comm.shim import is_fake
from shardgrad.errors import ShapeError
from shardgrad.layout import cost
from shardgrad.layout.batch_axis import BatchAxis, stored_over
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import parse_tensor
from shardgrad.layout.plan import route
from shardgrad.layout.sizes import Level, Sizes
from shardgrad.nn import init
from shardgrad.nn.linear import check_sequence_dim, cut_rows, row_letters, sequence_letter
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.rows import for_rows, for_rows_collectives
from shardgrad.ops.bound import BoundMatmul
from shardgrad.ops.matmul import bind, run


class VocabParallelEmbedding(ShardedModule):
    """A lookup in a table whose rows are cut over an axis: the product of one-hot rows with `W[v/tp,m]`.

    Each rank looks up what it holds; the rest is zero, and the sum over the axis is the lookup (all-reduce; with
    `sequence_dim`, reduce-scatter). Backward needs no communication (with `sequence_dim`, one all-gather of dY).

    Args:
        num_embeddings, embedding_dim: global sizes, as of nn.Embedding; the vocabulary need not divide by the ranks.
        padding_idx: the id whose row starts as zeros and gets no gradient.
        mesh, axis: the axis of the mesh that cuts the vocabulary.
        sequence_dim: the dim of the *output* (not the last) to leave cut over the axis; None to leave it replicated.
        data: the axis that cuts the ids' first dim, and how the table is stored over it; None without data parallelism.
        reduce_dtype: in which dX of `logits` is summed.
        device, dtype: of the table. Under torch.autocast rows are cast before they are sent, as products are: of the
            terms of their sum, all but one are zero. The table's gradient is summed in its own dtype.

    Shapes: ids [...] of integers (replicated over the axis) → [..., embedding_dim].

    `logits` is the output product with the same table (tied embeddings): one parameter, whose gradient is the sum of
    both uses, and which everything that counts parameters counts once.

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
        data: BatchAxis | None = None,
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mesh, (axis,) if data is None else (axis, data.axis))
        if num_embeddings < 1 or embedding_dim < 1:
            raise ShapeError(f"sizes must be at least 1, not num_embeddings={num_embeddings}, {embedding_dim=}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ShapeError(f"padding_idx={padding_idx} is outside the vocabulary of {num_embeddings}")
        self.num_embeddings, self.embedding_dim, self.axis = num_embeddings, embedding_dim, axis
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        check_sequence_dim(sequence_dim, "VocabParallelEmbedding")
        self.sequence_dim, self.data, self.reduce_dtype = sequence_dim, data, reduce_dtype
        sizes = {"v": num_embeddings, "m": embedding_dim}
        self.declare("weight", stored_over(data, f"W[v/{axis},m]", sizes), sizes, device, dtype)
        (self.first_id, _), (self.rows, _) = self._shardings["weight"].block()
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Embedding's initial values: normal with standard deviation 1, zeros for padding_idx."""
        self.fill("weight", partial(init.normal, 1.0), generator)
        pad = self._local_padding()
        if pad is not None and not self.weight.is_meta:
            with torch.no_grad():
                self.weight[pad].zero_()

    def _local_padding(self) -> int | None:
        if self.padding_idx is None or not self.first_id <= self.padding_idx < self.first_id + self.rows:
            return None
        return self.padding_idx - self.first_id

    def forward(self, ids: Tensor) -> Tensor:
        y = self._lookup(ids)
        if torch.is_autocast_enabled(y.device.type):
            y = y.to(torch.get_autocast_dtype(y.device.type))
        if self.sequence_dim is None:
            return all_reduce(y, self.mesh, self.axis)
        return reduce_scatter(y, self.mesh, self.axis, sequence_letter(y.dim(), self.sequence_dim, type(self).__name__))

    def logits(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """X Wᵀ with the table as W: `X[n,m] W[v/tp,m] -> L[n,v/tp]`, as a `ColumnParallelLinear` that has this weight.

        forward: no communication; dX: all-reduce. With `sequence_dim` (the same dim of x), all-gather of x, and dX is
        reduce-scattered.

        Args:
            x: [..., embedding_dim], replicated, or cut along sequence_dim.
            sequence_size: as of `ColumnParallelLinear`.

        Shapes: x [..., embedding_dim] → [..., num_embeddings / ranks].
        """
        dims = x.dim()
        if torch.compiler.is_compiling():
            product = self._bound(dims, self.axis, self.sequence_dim, str(self.data), self.reduce_dtype, self.mesh)
        else:
            product = self._products.get(dims) or self._bind(dims)
        sizes = {"v": self.num_embeddings, "m": self.embedding_dim}
        if sequence_size is not None and self.sequence_dim is not None:
            sizes[row_letters(dims - 1)[self.sequence_dim % dims]] = sequence_size
        return run(product, x, [self.weight], [], sizes)[0]

    def _bind(self, key: int) -> BoundMatmul:
        product = self._products[key] = bind((self.logits_layout(key),), (False,), self.mesh, (), self.reduce_dtype)
        return product

    def logits_layout(self, dims: int) -> Layout:
        """The layout of `logits` for x of so many dims."""
        rows, cut, _ = cut_rows(dims, self.sequence_dim, self.axis, self.data, type(self).__name__)
        return Layout(f"X[{cut}m] {self._shardings['weight'].spec} -> L[{rows}v/{self.axis}]")

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[cost.Collective]:
        """Every collective of this rank's lookup, forward and backward, for ids of a global shape. (Those of `logits`:
        `logits_layout(dims).collectives`.)

        dtype: in which rows travel; the table, over the data parallel axis, travels in its own.
        """
        mesh_view, width = view(self.mesh), cost.itemsize(dtype)
        rows, cut, _ = cut_rows(len(shape) + 1, self.sequence_dim, self.axis, self.data, type(self).__name__)
        known: dict[Level, int] = {
            (x, ()): n for x, n in zip((*row_letters(len(shape)), "m"), (*shape, self.embedding_dim))
        }
        sizes = Sizes(mesh_view.shape, mesh_view.coordinate, known)
        whole, stored = parse_tensor(f"Y[{rows}m]").dims, parse_tensor(f"Y[{cut}m]").dims
        own: Any = self.weight.dtype
        table = [] if self.data is None else for_rows_collectives(self._shardings["weight"], (self.data.axis,), own)
        return [
            *table,
            *cost.moved("forward", "Y", route(whole, stored, (self.axis,)), sizes, width, width),
            *cost.moved("dW", "dY", route(stored, whole), sizes, width, width),
        ]

    def _lookup(self, ids: Tensor) -> Tensor:
        """The rows that this rank holds, zeros for the others."""
        weight = (
            self.weight if self.data is None else for_rows(self.weight, self._shardings["weight"], (self.data.axis,))
        )
        local = ids - self.first_id
        elsewhere = (local < 0) | (local >= self.rows)
        # In a compiled graph the lookup itself refuses such ids.
        looks = not torch.compiler.is_compiling() and not is_fake(ids)
        if looks and ids.device.type == "cpu" and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(
                    f"ids reach from {low} to {high}, outside the vocabulary of {self.num_embeddings} (0 to "
                    f"{self.num_embeddings - 1}); shape {tuple(ids.shape)}"
                )
        if self.rows == 0:
            return weight.new_zeros((*ids.shape, self.embedding_dim)) + weight.sum()
        # An id outside the whole vocabulary stays outside here, so that torch's own check on CUDA fails.
        outside = (ids < 0) | (ids >= self.num_embeddings)
        local = local.masked_fill(elsewhere & ~outside, 0).masked_fill(outside, self.rows)
        y = F.embedding(local, weight, self._local_padding())
        return y.masked_fill(elsewhere.unsqueeze(-1), 0)

    def extra_repr(self) -> str:
        padding = f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        sequence = f", sequence_dim={self.sequence_dim}" if self.sequence_dim is not None else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, axis={self.axis!r}{sequence}"
