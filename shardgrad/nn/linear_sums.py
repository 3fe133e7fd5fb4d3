"""The product to a sharded vocabulary in chunks of tokens: logits of one chunk exist at a time.

It is a product of a layout, `X[n,d] W[v/tp,d] -> Z[n,v/tp]`. What X, W and B need before it, and their gradients after
it, are the layout's own routes; between these all is local:

    forward     of each chunk: Z = X Wᵀ + B
    backward    of each chunk, given dZ: dX = dZ W, dW += dZᵀ X, db += Σ dZ
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.comm.mesh import MeshView
from shardgrad.comm.pieces import exact, level_of, pieces_here, reduce_pieces
from shardgrad.layout.layout import Layout
from shardgrad.layout.plan import Move, Role
from shardgrad.layout.sizes import Sizes
from shardgrad.layout.tree import Level
from shardgrad.ops.in_pieces import compact
from shardgrad.ops.namespace import collective, run_route
from shardgrad.ops.overlap import is_set


@dataclass(frozen=True)
class Head:
    """The product that makes logits, as one rank computes it in one call.

    dtype: of its operands, to which they are cast. reduce_dtype: of reductions. kept: operands kept as gathered.
    """

    layout: Layout
    sizes: Sizes
    view: MeshView
    dtype: torch.dtype
    reduce_dtype: torch.dtype
    kept: frozenset[Role]
    biased: bool

    @property
    def over(self) -> str:
        """The axis that shards the vocabulary."""
        return self.layout.out.dims[-1].axes[0]

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes that shard the tokens, major first."""
        return tuple(axis for dim in self.layout.out.dims[:-1] for axis in dim.axes)

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of the tokens, [b, s, …]."""
        return self.sizes.shape_of(self.layout.out.dims[:-1])

    @property
    def pieces(self) -> tuple[int, int]:
        """Of this rank's tokens and of its part of the vocabulary, in exact mode; else 1 and 1."""
        return prod(pieces_here(self.view, axis) for axis in self.row_axes), pieces_here(self.view, self.over)

    def gathers(self, role: Role) -> tuple[Move, ...]:
        """How an operand comes to the product, where there are several ranks."""
        plan = self.layout.plan
        return self._real(plan.bias if role == "bias" else plan.gather[role])

    def reductions(self, role: Role) -> tuple[Move, ...]:
        """How the gradient of an operand comes to where the operand is stored, where there are several ranks."""
        plan = self.layout.plan
        return self._real(plan.bias_grad if role == "bias" else plan.reduce[role])

    def _real(self, moves: Sequence[Move]) -> tuple[Move, ...]:
        return tuple(move for move in moves if self.view.shape[move.axis] > 1)

    def keeps(self, role: Role) -> bool:
        """Whether backward finds an operand as it was gathered."""
        return role in self.kept and bool(self.gathers(role))

    def gathered(self, role: Role, tensor: Tensor) -> Tensor:
        """An operand as the product takes it."""
        name = self.layout.plan.names[role]
        return run_route(tensor.to(self.dtype), self.gathers(role), name, self.view, self.sizes)

    def name(self, role: Role) -> str:
        return f"d{self.layout.plan.names[role]}"

    def reduced(self, role: Role, grad: Tensor) -> Tensor:
        """A gradient as its operand is stored, in the dtype in which it was reduced."""
        moves = self.reductions(role)
        return run_route(grad.to(self.reduce_dtype), moves, self.name(role), self.view, self.sizes) if moves else grad

    def summed(self, role: Role, grads: Sequence[Tensor], levels: Sequence[Level]) -> Tensor:
        """The same of the gradients that single pieces have, in exact mode."""
        scatter = {move.axis: move.dim for move in self.layout.plan.reduce.get(role, ()) if move.kind != "all-reduce"}
        wide = [grad.to(self.reduce_dtype) for grad in grads] if levels else list(grads)
        return reduce_pieces(wide, levels, self.view, f"sum of {self.name(role)}", scatter)

    def chunks(self, size: int) -> Iterator[tuple[int, slice, bool]]:
        """Rows of at most `size` tokens, with the piece of the tokens that they are of, and whether they are the last.
        Pieces have chunks of their own, and so the same ones whatever the ranks."""
        count, tokens = self.pieces[0], prod(self.rows)
        each = tokens // count
        if not tokens:  # a rank without tokens takes part in what is reduced
            yield 0, slice(0, 0), True
        for piece in range(count):
            for start in range(piece * each, (piece + 1) * each, size):
                end = min(start + size, (piece + 1) * each)
                yield piece, slice(start, end), end == tokens


class Operands:
    """X [n, d], W [v/tp, d] and B [v/tp] as the product takes them. In exact mode, W and B piece by piece."""

    def __init__(self, head: Head, x: Tensor, w: Tensor, b: Tensor | None, *, kept: bool = False) -> None:
        """x, w, b: as they are stored; what the head keeps, as it was gathered where `kept` says so."""
        self.head, self.is_exact = head, exact(head.view) is not None
        x, w = self._here("lhs", x, kept), self._here("rhs", w, kept)
        b = None if b is None else self._here("bias", b, kept)
        self._whole = {"lhs": x, "rhs": w, "bias": b}
        self.x, pieces = x.reshape(-1, x.shape[-1]), head.pieces[1]
        self.w = [self.compact(part) for part in w.chunk(pieces)]
        self.b = [None] * pieces if b is None else [self.compact(part) for part in b.chunk(pieces)]

    def _here(self, role: Role, tensor: Tensor, kept: bool) -> Tensor:
        return tensor if kept and self.head.keeps(role) else self.head.gathered(role, tensor)

    def to_keep(self, x: Tensor, w: Tensor, b: Tensor | None) -> list[Tensor | None]:
        """What backward makes operands of."""
        stored: dict[Role, Tensor | None] = {"lhs": x, "rhs": w, "bias": b}
        return [self._whole[role] if self.head.keeps(role) else one for role, one in stored.items()]

    def compact(self, x: Tensor) -> Tensor:
        """Laid out in one way, in exact mode."""
        return compact(x) if self.is_exact else x

    def logits(self, rows: slice) -> Tensor:
        x = self.compact(self.x[rows])
        parts = [F.linear(x, w, b) for w, b in zip(self.w, self.b)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def parts(self, dz: Tensor) -> list[Tensor]:
        """A chunk's dZ, one for each of `w`."""
        return [dz] if len(self.w) == 1 else [compact(part) for part in dz.chunk(len(self.w), -1)]


class Gradients:
    """dX, dW and db of a head, which chunks add to. dW and db are sums in float32 of 16-bit products.

    wanted: of dX, dW and db, which. main: the caller's buffer for dW, to which chunks are added where nothing is left
    to be done with their sum.
    """

    def __init__(self, head: Head, operands: Operands, wanted: Sequence[bool], main: Tensor | None = None) -> None:
        self.head, self.operands = head, operands
        self.wanted = tuple(wanted)
        rows = head.pieces[0]
        x, ws = operands.x, operands.w
        wide = torch.promote_types(x.dtype, torch.float32)
        self._dx = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in ws] if wanted[0] else []
        self.direct = wanted[1] and main is not None and not operands.is_exact and not head.reductions("rhs")
        if self.direct and main is not None:
            self._dw = [[main]]
        else:
            self._dw = [[w.new_zeros(w.shape, dtype=wide) for w in ws] if wanted[1] else [] for _ in range(rows)]
        self._db = [[w.new_zeros(len(w), dtype=wide) for w in ws] if wanted[2] else [] for _ in range(rows)]
        self._levels = [level_of(head.view, *reversed(head.row_axes))] if head.row_axes else []
        moves = head.reductions("lhs")
        # Where one collective is all there is, it runs beside the products that follow.
        self._reduction = collective(moves[0], head.name("lhs"), head.view, head.sizes) if len(moves) == 1 else None
        by_chunk = is_set(head.view) and self._reduction is not None and moves[0].kind == "all-reduce"
        self._by_chunk = by_chunk and not operands.is_exact
        self._pending: list[tuple[slice, Any]] = []
        self._finished: list[Tensor] = []  # dX

    def add(self, piece: int, rows: slice, dz: Tensor, is_last: bool) -> None:
        """Of a chunk; the last one comes last."""
        parts, x = self.operands.parts(dz), self.operands.compact(self.operands.x[rows])
        for dx, part, w in zip(self._dx, parts, self.operands.w):
            torch.mm(part, w, out=dx[rows])
        if self._dx and not self.operands.is_exact:
            self._begin(rows, is_last)
        for dw, part in zip(self._dw[piece], parts):
            _add_product(dw, part.t(), x)
        for db, part in zip(self._db[piece], parts):
            db.add_(part.sum(0, dtype=db.dtype))

    def _begin(self, rows: slice, is_last: bool) -> None:
        if self._reduction is None or not (self._by_chunk or is_last):
            return
        dx = self._dx[0][rows] if self._by_chunk else self._stored(self._dx[0])
        self._pending.append((rows, self._reduction.start(dx.to(self.head.reduce_dtype))))

    def _stored(self, dx: Tensor) -> Tensor:
        return dx.view(*self.head.rows, dx.shape[-1])

    def scale(self, factor: Tensor) -> None:
        """Multiply all of them, dX as it is stored."""
        for one in (*self._finished, *(grad for each in (*self._dw, *self._db) for grad in each)):
            one.mul_(factor)

    def of_input(self) -> Tensor:
        """dX, stored as X is: all chunks are there."""
        if not self._finished:
            self._finished = [self._reduced_input()]
            self._dx.clear()
        return self._finished[0]

    def _reduced_input(self) -> Tensor:
        head = self.head
        if self.operands.is_exact:
            over = [level_of(head.view, head.over)]
            return head.summed("lhs", [self._stored(dx) for dx in self._dx], over)
        [dx] = self._dx
        if self._reduction is None or not self._pending:
            return head.reduced("lhs", self._stored(dx))
        if not self._by_chunk:
            return self._reduction.wait(self._pending[0][1])
        for rows, handle in self._pending:
            dx[rows] = self._reduction.wait(handle)
        return self._stored(dx)

    def of_weight(self) -> Tensor | None:
        """dW, stored as W is; None where it has been added to the caller's buffer."""
        return None if self.direct else self._of_columns("rhs", self._dw)

    def of_bias(self) -> Tensor:
        """db, stored as B is."""
        return self._of_columns("bias", self._db)

    def _of_columns(self, role: Role, grads: Sequence[Sequence[Tensor]]) -> Tensor:
        if not self.operands.is_exact:
            return self.head.reduced(role, grads[0][0])
        levels = self._levels if self.head.layout.plan.reduce["rhs"] else []
        joined = [parts[0] if len(parts) == 1 else torch.cat(list(parts)) for parts in grads]
        return self.head.summed(role, joined, levels)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, in total's dtype, which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
