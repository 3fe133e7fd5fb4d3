"""An embedding whose vocabulary is sharded over an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.arguments import told
from shardgrad.comm import shim
from shardgrad.comm.adjoint import all_reduce, reduce_scatter
from shardgrad.comm.mesh import view
from shardgrad.errors import ShapeError
from shardgrad.layout.cost import Collective
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import parse, parse_tensor
from shardgrad.layout.sizes import chunk
from shardgrad.nn import init
from shardgrad.nn.layer import Layer
from shardgrad.nn.parallel import Where
from shardgrad.nn.pieces import counts, is_exact, row_pieces, row_pieces_collectives, rows_of
from shardgrad.nn.template import Rows, sequence_row
from shardgrad.nn.transfer import transfer
from shardgrad.ops.pieces import cut, join

_LOOKUP = "I[n,v/tp] W[v/tp,m] -> Y[n/sp,m]"


class VocabParallelEmbedding(Layer, lookup=_LOOKUP, layout="X[n/sp,m] W[v/tp,m] -> L[n,v/tp]"):
    """A lookup in a table whose rows are sharded over an axis: a product with one-hot rows I; and `logits`, with X.

    Each rank looks up what it holds; the rest is zero, and the sum over the axis is the lookup.

    Args:
        num_embeddings, embedding_dim: global sizes, as of nn.Embedding; the vocabulary need not divide by the ranks.
        padding_idx: the id whose row starts as zeros and gets no gradient.
        parallel, or mesh, axis, sequence_dim, data, reduce_dtype, device, dtype: as of `Parallel`. sequence_dim is of
            the *output*; data shards the ids' first dim; reduce_dtype is for dX of `logits`. Under torch.autocast rows
            are cast before they are sent, as products are: of the terms of their sum, all but one are zero. The table's
            gradient is summed in its own dtype.

    Shapes: ids [...] of integers (replicated over the axis) → [..., embedding_dim].

    `logits` is the output product with the same table (tied embeddings): one parameter, whose gradient is the sum of
    both uses, and which everything that counts parameters counts once.

    Raises:
        IndexError: an id is outside the vocabulary (on CUDA: torch's device-side assertion).
    Source: Shoeybi et al. 2019, arXiv 1909.08053.
    """

    weight: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **where: Unpack[Where]
    ) -> None:
        super().__init__(where)
        if num_embeddings < 1 or embedding_dim < 1:
            raise ShapeError(f"sizes must be at least 1, not num_embeddings={num_embeddings}, {embedding_dim=}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ShapeError(f"padding_idx={padding_idx} is outside the vocabulary of {num_embeddings}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        over = view(self.mesh).axis(self.axis)
        self.first_id, self.rows = chunk(num_embeddings, over.size, over.index)
        self.build({"v": num_embeddings, "m": embedding_dim})

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **kwargs: Any) -> Self:
        """A layer with the table of an nn.Embedding, alike on every rank, of which each rank takes its rows.

        Args:
            kwargs: of the constructor, but the sizes and padding_idx.

        Raises:
            ValueError: the embedding has a setting that this layer has not.
        """
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, name):
                raise ValueError(f"{cls.__name__} has no {name}, which the nn.Embedding sets")
        sizes = embedding.num_embeddings, embedding.embedding_dim
        return cls.from_tensors({"weight": embedding.weight}, *sizes, embedding.padding_idx, **kwargs)

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

    @told
    def forward(self, ids: Tensor) -> Tensor:
        y = self._lookups(ids)
        if torch.is_autocast_enabled(y.device.type) and y.dtype != torch.float64:  # which autocast leaves alone
            y = y.to(torch.get_autocast_dtype(y.device.type))
        if self.sequence_dim is None:
            return all_reduce(y, self.mesh, self.axis, one_term=True)
        row = sequence_row(ids.dim(), self.sequence_dim, type(self).__name__)
        return reduce_scatter(y, self.mesh, self.axis, row, one_term=True)

    @told
    def logits(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """X Wᵀ with the table as W, as a `ColumnParallelLinear` that has this weight.

        Args:
            x: [..., embedding_dim], replicated, or sharded along sequence_dim (the same dim of x).
            sequence_size: as of `ColumnParallelLinear`.

        Shapes: x [..., embedding_dim] → [..., num_embeddings / ranks].
        """
        return self.multiply("X", x, sequence_size)[0]

    def logits_layout(self, dims: int) -> Layout:
        """The layout of `logits` for x of so many dims."""
        return self.layouts(dims)[0]

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[Collective]:
        """Every collective of this rank's lookup, forward and backward, for ids of a global shape. (Those of `logits`:
        `logits_layout(dims).collectives`.)

        dtype: in which rows travel; the table, over the data parallel axis, travels in its own.
        """
        own: Any = self.weight.dtype
        notation = parse(_LOOKUP)
        rows = Rows.of(notation, len(shape), self.parallel, type(self).__name__)
        stored = parse_tensor(rows.stored(notation.out, self.axis))
        summed = parse_tensor(replace(rows, sequence=None).stored(notation.out, self.axis))
        sizes = self.resolve({**dict(zip(rows.letters, shape)), "m": self.embedding_dim})
        return [
            *row_pieces_collectives("dW", [self._shardings["weight"]], self.mesh, rows_of(self.data), own),
            *transfer("forward", "Y", summed, stored, sizes, dtype, (self.axis,)),
            *transfer("dW", "dY", stored, summed, sizes, dtype),
        ]

    def _lookups(self, ids: Tensor) -> Tensor:
        """The rows that this rank holds, zeros for the others."""
        dims = rows_of(self.data)
        used = row_pieces([self.weight], [self._shardings["weight"]], self.mesh, dims)
        if not is_exact(self.mesh):
            return self._lookup(ids, used[0][0])
        along = counts(self.mesh, dims, ids)
        y = join([self._lookup(some, weight) for some, (weight,) in zip(cut(ids, along), used, strict=True)], along)
        return y + 0.0 if view(self.mesh).shape[self.axis] == 1 else y  # the sum with zeros has no -0

    def _lookup(self, ids: Tensor, weight: Tensor) -> Tensor:
        local = ids - self.first_id
        elsewhere = (local < 0) | (local >= self.rows)
        # In a compiled graph, and under torch.func, the lookup itself refuses such ids.
        looks = not self.compiling() and not shim.transforming() and not shim.is_fake(ids)
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
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._flags()}"
