"""What happens in forward and backward, step by step, for every rank of a mesh: what explains, draws and tabulates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as every
from math import prod
from typing import Any

from shardgrad.errors import LayoutError
from shardgrad.layout.cost import collectives, itemsize
from shardgrad.layout.explain import formula
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import Dim, TensorSpec
from shardgrad.layout.plan import Dims, Move, Role
from shardgrad.layout.schedule import AddBias, Communicate, Instruction, Matmul, Slice, SumBias, phases
from shardgrad.layout.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Moved:
    """One move of a route, and the bytes that each rank sends for it, by rank."""

    move: Move
    tensor: str
    bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorFlow:
    """A tensor from one storage to another.

    partial_before, partial_after: the axes over which it is a sum not yet summed, at either end.
    note: where a tensor that was moved before has come from.
    """

    name: str
    role: Role
    before: Dims
    after: Dims
    partial_before: tuple[str, ...]
    partial_after: tuple[str, ...]
    moves: tuple[Moved, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One phase: what it reads and how that comes to its place, the local product, and where its result goes.

    name: "forward", "dX", "dW", "db" (with the layout's names).
    formula: the local product, in the layout's letters.
    flops: floating-point operations of the local product, by rank: two for each multiplication and addition.
    bias: in forward, how the bias comes to the product's storage.
    """

    name: str
    formula: str
    reads: tuple[TensorFlow, ...]
    made: TensorFlow
    bias: TensorFlow | None
    flops: tuple[int, ...]

    @property
    def moves(self) -> tuple[Moved, ...]:
        """Every move of this phase, in order."""
        flows = (*self.reads, *((self.bias,) if self.bias else ()), self.made)
        return tuple(moved for flow in flows for moved in flow.moves)


MOST_RANKS = 2**16  # in some ten seconds


@dataclass(frozen=True, slots=True)
class Timeline:
    """All phases of a layout on a mesh.

    ranks: of every rank, in torch's order (the last axis runs fastest), its sizes and its place on the mesh.
    """

    layout: Layout
    sizes: Mapping[str, int]
    mesh: Mapping[str, int]
    dtype: str
    ranks: tuple[Sizes, ...]
    steps: tuple[Step, ...]


def timeline(
    layout: Layout,
    sizes: Mapping[str, int],
    mesh: Mapping[str, int],
    dtype: Any = "float32",
    *,
    save_gathered: Collection[str] = (),
) -> Timeline:
    """Forward and backward, every gradient wanted; arguments as those of `Layout.collectives`.

    Raises:
        LayoutError: as `Layout.collectives`; an axis of no ranks, or more than `MOST_RANKS` of them in all.
    """
    for axis, size in mesh.items():
        if size < 1:
            raise LayoutError(f"the mesh has {axis} = {size}: an axis has at least one rank")
    if prod(mesh.values()) > MOST_RANKS:
        raise LayoutError(
            f"the mesh has {prod(mesh.values()):,} ranks, and each is looked at: at most {MOST_RANKS:,}; "
            "Layout.collectives gives the bytes of one rank on a mesh of any size"
        )
    coordinates = [dict(zip(mesh, place)) for place in every(*(range(size) for size in mesh.values()))]
    sent: dict[tuple[str, str, str, str], list[int]] = {}
    ranks = tuple(layout.resolve(sizes, mesh, coordinate) for coordinate in coordinates)
    made = layout.instructions(mesh, bias=layout.has_bias, save_gathered=save_gathered)
    width = itemsize(dtype)
    for at, here in enumerate(ranks):
        for one in collectives(made, here, wire=width, reduce_wire=width):
            key = (one.phase, one.operation, one.tensor, one.axis)
            sent.setdefault(key, [0] * len(coordinates))[at] = one.bytes
    maker = _Maker(layout, mesh, ranks, sent)
    steps = tuple(maker.step(name, instructions) for name, instructions in phases(made).items())
    return Timeline(layout, sizes, mesh, str(dtype).removeprefix("torch."), ranks, steps)


class _Maker:
    def __init__(
        self,
        layout: Layout,
        mesh: Mapping[str, int],
        ranks: tuple[Sizes, ...],
        sent: Mapping[tuple[str, str, str, str], list[int]],
    ) -> None:
        self.layout, self.mesh, self.ranks, self.sent = layout, mesh, ranks, sent
        self.specs: dict[Role, TensorSpec] = {
            "lhs": layout.lhs,
            "rhs": layout.rhs,
            "out": layout.out,
            "bias": layout.bias,
        }
        self.moved_in: dict[str, str] = {}  # tensor -> the phase that gathered it

    def step(self, phase: str, instructions: Sequence[Instruction]) -> Step:
        """The step of one phase, which has one product, or one sum for db."""
        moves: dict[str, list[Move]] = {}
        for one in instructions:
            if isinstance(one, Communicate | Slice):
                moves.setdefault(one.tensor, []).append(one.move)
        forward = phase == "forward"
        product = next(one for one in instructions if isinstance(one, Matmul | SumBias))
        role: Role = product.role if isinstance(product, Matmul) else "bias"
        operands: tuple[Role, ...] = product.operands if isinstance(product, Matmul) else ("out",)
        reads = [self._read(phase, one, product, moves) for one in operands]
        made = self.specs[role]
        name = made.name if forward else phase
        route = moves.get(name, [])
        result = self._flow(
            phase,
            name,
            role,
            route[0].before if route else made.dims,
            made.partial if forward else made.grad_partial,
            route,
        )
        bias = None
        if forward and any(isinstance(one, AddBias) for one in instructions):
            spec = self.layout.bias
            bias = self._flow(phase, spec.name, "bias", spec.dims, (), moves.get(spec.name, []))
        flops = tuple(self._flops(sizes) if role != "bias" else 0 for sizes in self.ranks)
        local = formula(TensorSpec(name, result.before), [TensorSpec(read.name, read.after) for read in reads])
        return Step(phase, local, tuple(reads), result, bias, flops)

    def _read(self, phase: str, role: Role, product: Matmul | SumBias, moves: Mapping[str, list[Move]]) -> TensorFlow:
        spec, forward = self.specs[role], phase == "forward"
        name = f"d{spec.name}" if role == "out" else spec.name
        used = self.layout.reading.compute_layout(spec).dims
        if isinstance(product, SumBias) and not product.gathered:
            used = spec.dims
        note, before, route = "", spec.dims, moves.get(name, [])
        if route and not forward:
            self.moved_in[name] = phase
        elif not route and self._real(used) != self._real(spec.dims):
            since = self.moved_in.get(name)
            note, before = f"gathered for {since}" if since else "kept from forward", used
        return self._flow(phase, name, role, before, (), route, note)

    def _real(self, dims: Dims) -> Dims:
        """Without the axes of one rank, along which nothing moves."""
        return tuple(Dim(dim.letter, tuple(axis for axis in dim.axes if self.mesh[axis] > 1)) for dim in dims)

    def _flow(
        self,
        phase: str,
        name: str,
        role: Role,
        before: Dims,
        left: tuple[str, ...],
        moves: Sequence[Move],
        note: str = "",
    ) -> TensorFlow:
        nothing = [0] * len(self.ranks)
        moved = tuple(
            Moved(move, name, tuple(self.sent.get((phase, move.kind, name, move.axis), nothing))) for move in moves
        )
        summed = tuple(move.axis for move in moves if move.kind in ("reduce-scatter", "all-reduce"))
        left = tuple(axis for axis in left if self.mesh[axis] > 1)
        after = moves[-1].after if moves else before
        return TensorFlow(name, role, before, after, (*summed, *left), left, moved, note)

    def _flops(self, sizes: Sizes) -> int:
        """Two for every choice of one index of every letter, each letter sharded by the axes that split it."""
        local: dict[str, tuple[str, ...]] = {}
        for spec in (self.layout.lhs, self.layout.rhs, self.layout.out):
            local |= {dim.letter: dim.axes for dim in self.layout.reading.compute_layout(spec).dims}
        counts = [sizes.get(letter, axes) for letter, axes in local.items()]
        return 2 * prod(count for count in counts if count is not None)


def check_rank(timeline: Timeline, rank: int) -> int:
    """The rank, if the mesh has it.

    Raises:
        LayoutError: it has fewer.
    """
    if not 0 <= rank < len(timeline.ranks):
        raise LayoutError(
            f"rank {rank} is not one of the {len(timeline.ranks)} ranks of the mesh {dict(timeline.mesh)}"
        )
    return rank
