"""What the names in a printed program stand for: collectives, local products, dtypes. Built once for a set of sizes."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import CodeType
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.comm.collectives import AllGather, AllReduce, Collective, ReduceScatter, keep_chunk
from shardgrad.comm.mesh import MeshView
from shardgrad.comm.tree import TreeAllReduce, TreeReduceScatter
from shardgrad.layout.plan import Move
from shardgrad.layout.printer import Printed
from shardgrad.layout.schedule import (
    Accumulate,
    Call,
    Cast,
    Communicate,
    Fold,
    Hold,
    InPieces,
    Instruction,
    Matmul,
    Slice,
    Term,
)
from shardgrad.layout.sizes import Sizes
from shardgrad.layout.tree import Summed
from shardgrad.ops.bilinear import Local, Map
from shardgrad.ops.in_pieces import Piecewise, fold, sum_bias
from shardgrad.ops.micro_batches import hold


class Namespace:
    """Makes functions of printed programs.

    local: of each product, its local map with the two transposes.
    """

    def __init__(self, view: MeshView, sizes: Sizes, local: Sequence[Local]) -> None:
        self.view, self.sizes, self.local = view, sizes, local

    def function(self, printed: Printed, title: str) -> Callable[..., Any]:
        """The function. Its text is its docstring, and tracebacks show its lines, under `title`."""
        space: dict[str, Any] = {"linear": F.linear, "matmul": torch.matmul, "addmm": torch.addmm}
        space |= {name: self.meaning(one) for name, one in printed.globals.items()}
        exec(_code(printed.text, f"<shardgrad {printed.name}: {title}>"), space)
        made: Callable[..., Any] = space[printed.name]
        made.__doc__ = printed.text
        return made

    def meaning(self, one: Instruction) -> Any:
        """What the name of an instruction stands for."""
        match one:
            case Communicate():
                return collective(one.move, one.tensor, self.view, self.sizes, one.summed)
            case Slice():
                return partial(keep_chunk, axis=self.view.axes[one.move.axis], dim=one.move.dim)
            case Cast():
                return getattr(torch, one.dtype)
            case Matmul():
                return self.map(one) if one.bias is None else self.map(one).with_bias
            case InPieces():
                return Piecewise(one, [self._term(term) for term in one.terms])
            case Hold():
                wide, dtype = (None if name is None else getattr(torch, name) for name in (one.wide, one.dtype))
                return partial(hold, view=self.view, at=one.at, wide=wide, dtype=dtype)
            case Fold():
                return partial(fold, level=one.level, held=one.held, lead=one.lead)
            case Accumulate(value=Matmul() as made):
                return self.map(made).add_to
            case Call():
                return one.function
        raise TypeError(f"no name stands for {one}")

    def _term(self, term: Term) -> Callable[..., Tensor]:
        made = term.made
        if isinstance(made, Matmul):
            return self.map(made) if made.bias is None else self.map(made).with_bias
        return partial(sum_bias, letters=made.letters)

    def map(self, one: Matmul) -> Map:
        """The local map of a product or of a gradient."""
        local = self.local[one.index]
        return {"out": local.out, "lhs": local.grad_lhs, "rhs": local.grad_rhs}[one.role]


def collective(move: Move, tensor: str, view: MeshView, sizes: Sizes, summed: Summed | None = None) -> Collective:
    """A move as a collective. summed: the order in which a reduction adds; None: the backend's."""
    axis, what = view.axes[move.axis], f"{move.kind} of {tensor}"
    if summed is not None:
        in_tree = move.kind == "all-reduce"
        return TreeAllReduce(axis, summed, what) if in_tree else TreeReduceScatter(axis, move.dim, summed, what)
    if move.kind == "all-reduce":
        return AllReduce(axis, what)
    if move.kind == "reduce-scatter":
        return ReduceScatter(axis, move.dim, what)
    gathered = move.after[move.dim]
    size = sizes.get(gathered.letter, gathered.axes)
    assert size is not None, f"the size of {gathered} was not resolved"
    return AllGather(axis, move.dim, size, what)


def run_route(x: Tensor, moves: Sequence[Move], tensor: str, view: MeshView, sizes: Sizes) -> Tensor:
    """A tensor at the end of a route; it may be changed."""
    for move in moves:
        axis = view.axes[move.axis]
        if axis.size > 1:
            x = keep_chunk(x, axis, move.dim) if move.kind == "slice" else collective(move, tensor, view, sizes)(x)
    return x


@lru_cache(maxsize=4096)
def _code(text: str, title: str) -> CodeType:
    """A program's code; where the same text was compiled before, that."""
    file = f"{title} #{crc32(text.encode()):08x}"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    return compile(text, file, "exec")
