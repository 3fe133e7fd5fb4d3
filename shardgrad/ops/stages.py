"""What a program is made of: tensors by the number of their slot, what is sent, what is computed."""

from __future__ import annotations

from dataclasses import dataclass

from shardgrad.ops.bilinear import Map
from shardgrad.ops.chunks import ChunkedGatherMatmul, ChunkedMatmulReduce, ChunkedRhsGatherMatmul
from shardgrad.ops.route import Step
from shardgrad.ops.terms import Terms

Route = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """Send the tensor of one slot on a route, into another slot (or the same)."""

    source: int
    target: int
    route: Route


@dataclass(frozen=True, slots=True)
class Forward:
    """One product: the slots of its operands, the route of what it makes, the slot of its bias (None without).

    chunks: does the product and its reduction side by side, in place of the route.
    """

    terms: Terms
    lhs: int
    rhs: int
    route: Route
    bias: int | None
    chunks: ChunkedMatmulReduce | None = None


@dataclass(frozen=True, slots=True)
class Piecewise:
    """A gather that is done side by side with the products that read it, in place of its start."""

    start: Start
    chunks: ChunkedGatherMatmul | ChunkedRhsGatherMatmul


@dataclass(frozen=True, slots=True)
class Stage:
    """One phase of backward: what to start, what to compute, where it goes.

    starts: the gathers that this phase reads (first stage only), and those of the next phase, to run under this one.
    terms: the products to sum, as a bilinear map and the slots of its operands; none for db.
    bias: for db, the local mathematics and the slot of dY.
    route: of what is made, to where it is stored.
    output: its position among the results.
    done: slots that no later phase reads.
    gather: does the gather of one operand and the product side by side.
    chunks: does the product and its reduction side by side, in place of the route.
    """

    starts: tuple[Start, ...]
    terms: tuple[tuple[Map, int, int], ...]
    bias: tuple[Terms, int] | None
    route: Route
    output: int
    done: tuple[int, ...]
    gather: Piecewise | None = None
    chunks: ChunkedMatmulReduce | None = None
