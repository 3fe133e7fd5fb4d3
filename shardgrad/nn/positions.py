"""Learned positions, also where the sequence is sharded. (Rotary ones need no parameters: `rotary`.)"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from shardgrad.arguments import told
from shardgrad.comm.adjoint import slice_replicated
from shardgrad.comm.pieces import refuse_exact_on
from shardgrad.errors import ShapeError
from shardgrad.layout.cost import Collective
from shardgrad.layout.notation import parse_tensor
from shardgrad.nn import init
from shardgrad.nn.layer import Layer
from shardgrad.nn.parallel import OnRows
from shardgrad.nn.pieces import counts, is_exact, row_pieces, row_pieces_collectives, rows_of
from shardgrad.nn.replicated import for_rows
from shardgrad.nn.transfer import transfer
from shardgrad.ops.pieces import cut, join


class LearnedPositions(Layer):
    """A table `W[s,m]`, replicated, of which each rank adds the rows of its part of the sequence to x [b, s/tp, m].

    Every rank has the whole batch at its positions, so the gradient of its rows is complete: the table's is the ranks'
    rows gathered (the adjoint of a slice that is stored sharded), and nothing is summed. Where x is replicated, nothing
    moves at all.

    Args:
        num_positions, embed_dim: of the table, as of nn.Embedding.
        parallel, or mesh, axis, sequence_dim, data, device, dtype: as of `Parallel`; sequence_dim, of x [b, s, m], is 1
            or None.

    Raises:
        ShapeError: a size is not positive, or sequence_dim is neither None nor 1.
    """

    weight: Tensor
    takes = OnRows

    def __init__(self, num_positions: int, embed_dim: int, **where: Unpack[OnRows]) -> None:
        super().__init__(where)
        if num_positions < 1 or embed_dim < 1:
            raise ShapeError(f"LearnedPositions: sizes must be at least 1, not {num_positions=}, {embed_dim=}")
        if self.sequence_dim not in (None, 1):
            raise ShapeError(f"LearnedPositions: x is [b, s, m], so sequence_dim is 1 or None, not {self.sequence_dim}")
        self.num_positions, self.embed_dim = num_positions, embed_dim
        self._sizes = {"s": num_positions, "m": embed_dim}
        self.add("weight", self.stored(parse_tensor("W[s,m]")))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Embedding's initial values: normal with standard deviation 1."""
        self.fill("weight", partial(init.normal, 1.0), generator)

    @told
    def forward(self, sequence: int, first: int = 0) -> Tensor:
        """The rows to add to x: of this rank's part of `sequence` positions, the first of which is `first`.

        Shapes: [s/tp, m], or [s, m] without sequence_dim.

        Raises:
            ShapeError: the table has no such positions.
            LayoutError: in exact mode, where `add_to` is to be used: a sum over the batch is the gradient.
        """
        self._check(sequence, first)
        cuts = (*self.parallel.axes[1:], *([] if self.sequence_dim is None else [self.axis]))
        instead = "let the layer add them: positions.add_to(x, sequence)"
        refuse_exact_on(self.mesh, cuts, "the sum over the batch that positions are added to", instead)
        (weight,) = for_rows([self.weight], [self._shardings["weight"]], self.parallel.axes[1:])
        return self._rows(weight, sequence, first)

    def add_to(self, x: Tensor, sequence: int, first: int = 0) -> Tensor:
        """x [b, s/tp, m] plus the rows of its positions, in x's dtype. Arguments as of a call."""
        if not is_exact(self.mesh):
            return x + self(sequence, first).to(x.dtype)
        self._check(sequence, first)
        batch = rows_of(self.data)
        tables = row_pieces([self.weight], [self._shardings["weight"]], self.mesh, batch)
        along = [] if self.sequence_dim is None else [self.axis]
        cuts = counts(self.mesh, [*batch, (1, along)], x)
        rows = [piece for (table,) in tables for piece in cut(self._rows(table, sequence, first), {0: cuts[1]})]
        return join([piece + row.to(x.dtype) for piece, row in zip(cut(x, cuts), rows, strict=True)], cuts)

    def _check(self, sequence: int, first: int) -> None:
        if first < 0 or sequence < 0 or first + sequence > self.num_positions:
            raise ShapeError(
                f"positions {first} to {first + sequence - 1} are needed, of {self.num_positions} (num_positions)"
            )

    def _rows(self, table: Tensor, sequence: int, first: int) -> Tensor:
        rows = table[first : first + sequence]
        return rows if self.sequence_dim is None else slice_replicated(rows, self.mesh, self.axis, dim=0)

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[Collective]:
        """Every collective of this rank's forward and backward for x of global shape [b, s, m], whatever its dtype: the
        table travels in its own."""
        own: Any = self.weight.dtype
        table = row_pieces_collectives("dW", [self._shardings["weight"]], self.mesh, rows_of(self.data), own)
        sizes = self.resolve({"s": shape[1], "m": self.embed_dim})
        here = "W[s,m]" if self.sequence_dim is None else f"W[s/{self.axis},m]"
        pieces = counts(self.mesh, rows_of(self.data)).get(0, 1)  # each of which gathers its own
        return [*table, *(row for _ in range(pieces) for row in transfer("dW", "dW", here, "W[s,m]", sizes, own))]

    def extra_repr(self) -> str:
        return f"{self.num_positions}, {self.embed_dim}, {self._flags()}"
