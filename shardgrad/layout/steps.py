"""What happens in forward and backward, step by step, for every rank of a mesh: what explains, draws and tabulates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product as every
from math import prod
from typing import Any

from shardgrad.errors import LayoutError
from shardgrad.layout.explain import formula
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.plan import Dims, Move, Phase, Role, backward_phases, forward_phases
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
            "Layout.collectives tells the bytes of one rank on a mesh of any size"
        )
    coordinates = [dict(zip(mesh, place)) for place in every(*(range(size) for size in mesh.values()))]
    sent: dict[tuple[str, str, str, str], list[int]] = {}
    for at, coordinate in enumerate(coordinates):
        for one in layout.collectives(sizes, mesh, dtype, save_gathered=save_gathered, coordinate=coordinate):
            key = (one.phase, one.operation, one.tensor, one.axis)
            sent.setdefault(key, [0] * len(coordinates))[at] = one.bytes
    ranks = tuple(layout.resolve(sizes, mesh, coordinate) for coordinate in coordinates)
    roles: dict[str, Role] = {layout.lhs.name: "lhs", layout.rhs.name: "rhs"}
    kept = {(roles[name], 0) for name in save_gathered}
    need: set[Role] = {"lhs", "rhs"}
    if layout.has_bias:
        need.add("bias")
    maker = _Maker(layout, mesh, ranks, sent, need)
    phases = forward_phases([layout.plan], [layout.has_bias]), backward_phases([layout.plan], [need], kept)
    steps = tuple(maker.step(phase) for group in phases for phase in group)
    return Timeline(layout, sizes, mesh, str(dtype).removeprefix("torch."), ranks, steps)


class _Maker:
    def __init__(
        self,
        layout: Layout,
        mesh: Mapping[str, int],
        ranks: tuple[Sizes, ...],
        sent: Mapping[tuple[str, str, str, str], list[int]],
        need: Collection[Role],
    ) -> None:
        self.layout, self.mesh, self.ranks, self.sent, self.need = layout, mesh, ranks, sent, need
        self.specs: dict[Role, TensorSpec] = {
            "lhs": layout.lhs,
            "rhs": layout.rhs,
            "out": layout.out,
            "bias": layout.bias,
        }
        self.moved_in: dict[Role, str] = {}  # role -> the phase that gathered it

    def step(self, phase: Phase) -> Step:
        forward = phase.name == "forward"
        reads, bias = [], None
        for read in phase.reads:
            spec = self.specs[read.role]
            gradient = read.role == "out" and not forward
            name = f"d{spec.name}" if gradient else spec.name
            used = self.layout.reading.compute_layout(spec).dims
            if read.role == "bias":
                bias = self._flow(phase.name, name, "bias", spec.dims, (), read.moves)
                continue
            note, before = "", spec.dims
            if phase.made == "bias" and not self.layout.plan.bias_reads_gathered(self.need):
                used = spec.dims
            if not read.moves and used != spec.dims:
                since = self.moved_in.get(read.role)
                note, before = f"gathered for {since}" if since else "kept from forward", used
            elif read.moves and not forward:
                self.moved_in[read.role] = phase.name
            reads.append(self._flow(phase.name, name, read.role, before, (), read.moves, note))
        made = self.specs[phase.made]
        name = made.name if forward else "db" if phase.made == "bias" else f"d{made.name}"
        left = made.partial if forward else made.grad_partial
        before = phase.reduce[0].before if phase.reduce else made.dims
        result = self._flow(phase.name, name, phase.made, before, left, phase.reduce)
        operands = [TensorSpec(r.name, r.after) for r in reads]
        flops = tuple(self._flops(sizes) if phase.made != "bias" else 0 for sizes in self.ranks)
        return Step(phase.name, formula(TensorSpec(name, before), operands), tuple(reads), result, bias, flops)

    def _flow(
        self,
        phase: str,
        name: str,
        role: Role,
        before: Dims,
        left: tuple[str, ...],
        moves: tuple[Move, ...],
        note: str = "",
    ) -> TensorFlow:
        told = []
        for move in moves:
            if self.mesh[move.axis] == 1:
                continue
            sent = self.sent.get((phase, move.kind, name, move.axis), [0] * len(self.ranks))
            told.append(Moved(move, name, tuple(sent)))
        summed = tuple(m.move.axis for m in told if m.move.kind in ("reduce-scatter", "all-reduce"))
        left = tuple(axis for axis in left if self.mesh[axis] > 1)
        after = moves[-1].after if moves else before
        return TensorFlow(name, role, before, after, (*summed, *left), left, tuple(told), note)

    def _flops(self, sizes: Sizes) -> int:
        """Two for every choice of one index of every letter, each letter cut by the axes that split it."""
        cut: dict[str, tuple[str, ...]] = {}
        for spec in (self.layout.lhs, self.layout.rhs, self.layout.out):
            cut |= {dim.letter: dim.axes for dim in self.layout.reading.compute_layout(spec).dims}
        local = [sizes.get(letter, axes) for letter, axes in cut.items()]
        return 2 * prod(size for size in local if size is not None)


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
