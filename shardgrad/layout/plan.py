"""From a layout to routes: how each tensor comes from where it is stored to where it is used, and back.

A `route` brings a tensor stored in one way (and perhaps partial over some axes) to another. `lower` makes instructions
of the routes that forward and backward need. No sizes, no ranks, no tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from shardgrad.layout.notation import Dim, Notation, TensorSpec
from shardgrad.layout.rule import Reading

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "slice"]
Role = Literal["lhs", "rhs", "out", "bias"]
Dims = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """One step of a route along one mesh axis. `slice` is local; an all-reduce has no dim (-1)."""

    kind: Kind
    axis: str
    dim: int
    before: Dims
    after: Dims


def route(src: Dims, dst: Dims, partial: Collection[str] = (), left: Collection[str] = ()) -> tuple[Move, ...]:
    """Bring a tensor from `src` to `dst` storage, summing over `partial` axes except those `left` to the caller.

    The cheapest order that is always right: undo what `dst` does not share (innermost first), then shard (a
    reduce-scatter where the axis is partial, else a local slice), then all-reduce what is still partial.
    """
    pending = [axis for axis in partial if axis not in left]
    moves: list[Move] = []
    now = list(src)
    for at, (have, want) in enumerate(zip(src, dst)):
        shared = 0
        while shared < min(len(have.axes), len(want.axes)) and have.axes[shared] == want.axes[shared]:
            shared += 1
        for axis in reversed(have.axes[shared:]):
            before, now[at] = tuple(now), Dim(have.letter, now[at].axes[:-1])
            moves.append(Move("all-gather", axis, at, before, tuple(now)))
    for at, want in enumerate(dst):
        for axis in want.axes[len(now[at].axes) :]:
            before, now[at] = tuple(now), Dim(want.letter, (*now[at].axes, axis))
            kind: Kind = "reduce-scatter" if axis in pending else "slice"
            moves.append(Move(kind, axis, at, before, tuple(now)))
            pending = [other for other in pending if other != axis]
    moves += [Move("all-reduce", axis, -1, tuple(now), tuple(now)) for axis in pending]
    return tuple(moves)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every route of one layout, derived once.

    names, letters: of each tensor. partial: the axes over which the product's sum is left to the caller.
    splitting: the axes that split each letter. stored: the dims of each tensor as it is stored.
    """

    names: dict[Role, str]
    letters: dict[Role, tuple[str, ...]]
    splitting: dict[str, tuple[str, ...]]
    partial: tuple[str, ...]
    stored: dict[Role, Dims]
    gather: dict[Role, tuple[Move, ...]]  # stored -> used; of `out`: dY for the products of backward
    reduce: dict[Role, tuple[Move, ...]]  # local product -> stored; of an operand: its gradient
    bias: tuple[Move, ...]  # B -> the product's storage
    bias_grad: tuple[Move, ...]  # db from dY as stored
    bias_grad_gathered: tuple[Move, ...]  # db from dY as gathered for a product
    bias_can_share: bool

    def gathers(self, *, bias: bool) -> tuple[Move, ...]:
        """Every all-gather that some call of the layout may need."""
        routes = [*self.gather.values(), *((self.bias, self.bias_grad, self.bias_grad_gathered) if bias else ())]
        return tuple(move for moves in routes for move in moves if move.kind == "all-gather")

    def bias_reads_gathered(self, need: Collection[Role]) -> bool:
        """Whether db is summed from the dY that was gathered for a product, rather than from dY as stored."""
        return self.bias_can_share and ("lhs" in need or "rhs" in need)


def derive(layout: Notation, reading: Reading) -> Plan:
    """The plan of a legal layout."""
    tensors: dict[Role, TensorSpec] = {"lhs": layout.lhs, "rhs": layout.rhs, "out": layout.out}
    gather: dict[Role, tuple[Move, ...]] = {}
    reduce: dict[Role, tuple[Move, ...]] = {}
    splitting: dict[str, tuple[str, ...]] = {}
    for role, spec in tensors.items():
        used = reading.compute_layout(spec).dims
        splitting |= {dim.letter: dim.axes for dim in used}
        gather[role] = route(spec.dims, used)
        reduce[role] = route(used, spec.dims, reading.communicated_over(spec), (*spec.partial, *spec.grad_partial))
    product, bias = layout.out, reading.bias
    at_product = tuple(Dim(d.letter, product.axes_of(d.letter)) for d in bias.dims)
    at_gathered = tuple(Dim(d.letter, reading.compute_layout(product).axes_of(d.letter)) for d in bias.dims)
    missing = [axis for dim in product.dims if dim.letter not in bias.letters for axis in dim.axes]
    missing_gathered = [a for d in reading.compute_layout(product).dims if d.letter not in bias.letters for a in d.axes]
    return Plan(
        stored={**{role: spec.dims for role, spec in tensors.items()}, "bias": bias.dims},
        names={**{role: spec.name for role, spec in tensors.items()}, "bias": bias.name},
        letters={**{role: spec.letters for role, spec in tensors.items()}, "bias": bias.letters},
        splitting=splitting,
        partial=product.partial,
        gather=gather,
        reduce=reduce,
        bias=route(bias.dims, at_product),
        bias_grad=route(at_product, bias.dims, missing, bias.grad_partial),
        bias_grad_gathered=route(at_gathered, bias.dims, missing_gathered, bias.grad_partial),
        # A sum left to the caller must still be partial: then dY is read as stored, not as gathered.
        bias_can_share=all(axis in missing_gathered for axis in bias.grad_partial),
    )
