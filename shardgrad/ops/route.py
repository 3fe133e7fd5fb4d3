"""Running a route: the plan's moves on a real tensor, the first started at once, the rest as they are waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shardgrad.comm import collectives as raw
from shardgrad.comm.mesh import Axis, MeshView
from shardgrad.layout.plan import Kind, Move
from shardgrad.layout.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Step:
    """A move with everything known: the axis with its group, the size to gather to, the dtype to change to.

    ready: the collective, if the move is one.
    """

    kind: Kind | Literal["cast"]
    what: str
    axis: Axis | None = None
    dim: int = -1
    global_size: int = 0
    dtype: torch.dtype | None = None
    ready: raw.Ready | None = field(default=None, compare=False)


def steps(
    moves: Sequence[Move], name: str, view: MeshView, sizes: Sizes, reduce_dtype: torch.dtype | None, dtype: torch.dtype
) -> tuple[Step, ...]:
    """Make moves concrete. Axes of one rank drop out; reductions of 16-bit tensors are cast around if asked."""
    made: list[Step] = []
    for move in moves:
        axis = view.axes[move.axis]
        if axis.size == 1:
            continue
        what = f"{move.kind} of {name}"
        if move.kind == "all-gather":
            letter = move.after[move.dim]
            global_size = sizes.get(letter.letter, letter.axes)
            assert global_size is not None, f"the size of {letter} was not resolved"
            gather = raw.AllGather(axis, move.dim, global_size, what)
            made.append(Step(move.kind, what, axis, move.dim, global_size, ready=gather))
        elif move.kind == "reduce-scatter":
            made.append(Step(move.kind, what, axis, move.dim, ready=raw.ReduceScatter(axis, move.dim, what)))
        else:
            reduce = raw.AllReduce(axis, what) if move.kind == "all-reduce" else None
            made.append(Step(move.kind, what, axis, move.dim, ready=reduce))
    reducing = [at for at, step in enumerate(made) if step.kind in ("reduce-scatter", "all-reduce")]
    if reducing and reduce_dtype is not None and reduce_dtype != dtype:
        made.insert(reducing[-1] + 1, Step("cast", "cast", dtype=dtype))
        made.insert(reducing[0], Step("cast", "cast", dtype=reduce_dtype))
    return tuple(made)


class RouteRunner:
    """A tensor on its way along steps. Collectives start as early as their input exists; `result` waits for the last.

    The tensor must be the route's own where a step reduces it (a fresh local product is).
    """

    __slots__ = ("_next", "_pending", "_steps", "_tensor")

    def __init__(self, tensor: Tensor, route: tuple[Step, ...]) -> None:
        self._tensor: Tensor = tensor
        self._pending: raw.Pending | None = None
        self._steps = route
        self._next = 0
        if route:
            self._advance()

    def _advance(self) -> None:
        while self._next < len(self._steps) and self._pending is None:
            step = self._steps[self._next]
            self._next += 1
            if step.kind == "cast":
                self._tensor = self._tensor.to(step.dtype)
                continue
            assert step.axis is not None
            if step.ready is None:
                self._tensor = raw.cut(self._tensor, step.axis, step.dim)
            else:
                self._pending = raw.begin(step.ready, self._tensor)

    def result(self) -> Tensor:
        """The tensor at the end of the route."""
        while self._pending is not None:
            self._tensor = self._pending.wait()
            self._pending = None
            self._advance()
        return self._tensor
