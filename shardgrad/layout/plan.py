"""From a layout to steps: what each phase gathers, multiplies and reduces. No sizes, no ranks, no tensors.

Everything that moves is a `route`: a tensor stored in one way (and perhaps partial over some axes) brought to another.
The executor runs the moves, `cost` adds up their bytes, `explain` tells them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor that a phase reads, and the moves that bring it from where it is stored to where it is used.

    index: which of the products that share an input it belongs to. A tensor read before has no moves left.
    """

    role: Role
    index: int
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Phase:
    """Local products, summed, and what surrounds them. In backward phases the role `out` stands for dY.

    made: the role whose value (forward) or gradient (backward) is produced.
    reads: forward, both operands and perhaps the bias; backward, dY and an operand in turn; for db, dY alone.
    reduce: the moves of what was made, from partial sums to where it is stored.
    """

    name: str
    made: Role
    index: int
    reads: tuple[Read, ...]
    reduce: tuple[Move, ...]


def route(src: Dims, dst: Dims, partial: Collection[str] = (), left: Collection[str] = ()) -> tuple[Move, ...]:
    """Bring a tensor from `src` to `dst` storage, summing over `partial` axes except those `left` to the caller.

    The cheapest order that is always right: undo what `dst` does not share (innermost first), then cut (a
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
    """Every route of one layout, derived once; `forward_phases` and `backward_phases` pick what a call needs."""

    names: dict[Role, str]
    out_dims: Dims  # as the product, and so dY, is stored
    gather: dict[Role, tuple[Move, ...]]  # stored -> used; of `out`: dY for the products of backward
    reduce: dict[Role, tuple[Move, ...]]  # local product -> stored; of an operand: its gradient
    bias: tuple[Move, ...]  # B -> the product's storage
    bias_grad: tuple[Move, ...]  # db from dY as stored
    bias_grad_gathered: tuple[Move, ...]  # db from dY as gathered for a product
    bias_can_share: bool

    def bias_reads_gathered(self, need: Collection[Role]) -> bool:
        """Whether db is summed from the dY that was gathered for a product, rather than from dY as stored."""
        return self.bias_can_share and ("lhs" in need or "rhs" in need)


def shares(plans: Sequence[Plan]) -> tuple[int, ...]:
    """For each product of one input, the first product that gathers and reduces this input in the same way."""
    keys = [(plan.gather["lhs"], plan.reduce["lhs"]) for plan in plans]
    return tuple(keys.index(key) for key in keys)


def forward_phases(plans: Sequence[Plan], bias: Sequence[bool]) -> tuple[Phase, ...]:
    """The products of one input: Y, and B on its way to be added to it (after the reduction, once)."""
    phases = []
    for at, (plan, share) in enumerate(zip(plans, shares(plans))):
        reads = [
            Read("lhs", share, plan.gather["lhs"] if share == at else ()),
            Read("rhs", at, plan.gather["rhs"]),
        ]
        if bias[at]:
            reads.append(Read("bias", at, plan.bias))
        phases.append(Phase("forward", "out", at, tuple(reads), plan.reduce["out"]))
    return tuple(phases)


def backward_phases(
    plans: Sequence[Plan], needs: Sequence[Collection[Role]], save_gathered: Collection[tuple[Role, int]] = ()
) -> tuple[Phase, ...]:
    """The gradients that each product `needs` (`lhs`, `rhs`, `bias`), in the order in which they run.

    An operand in `save_gathered` (role and index) was kept as gathered in forward. Each dY is gathered once, in the
    first phase that reads it; dX of products that share their input is summed locally and reduced once.
    """
    seen: set[tuple[Role, int]] = set()

    def read(role: Role, index: int, moves: tuple[Move, ...]) -> Read:
        fresh = (role, index) not in seen and (role, index) not in save_gathered
        seen.add((role, index))
        return Read(role, index, moves if fresh else ())

    phases = []
    share_of = shares(plans)
    for share in dict.fromkeys(share_of):
        summed = [at for at, plan in enumerate(plans) if share_of[at] == share and "lhs" in needs[at]]
        if summed:
            reads = []
            for at in summed:
                reads.append(read("out", at, plans[at].gather["out"]))
                reads.append(read("rhs", at, plans[at].gather["rhs"]))
            name = f"d{plans[share].names['lhs']}"
            phases.append(Phase(name, "lhs", share, tuple(reads), plans[share].reduce["lhs"]))
    for at, plan in enumerate(plans):
        if "rhs" in needs[at]:
            reads = [
                read("out", at, plan.gather["out"]),
                read("lhs", share_of[at], plan.gather["lhs"]),
            ]
            phases.append(Phase(f"d{plan.names['rhs']}", "rhs", at, tuple(reads), plan.reduce["rhs"]))
    for at, plan in enumerate(plans):
        if "bias" in needs[at]:
            moves = plan.bias_grad_gathered if plan.bias_reads_gathered(needs[at]) else plan.bias_grad
            phases.append(Phase("db", "bias", at, (Read("out", at, ()),), moves))
    return tuple(phases)


def derive(layout: Notation, reading: Reading) -> Plan:
    """The plan of a legal layout."""
    tensors: dict[Role, TensorSpec] = {"lhs": layout.lhs, "rhs": layout.rhs, "out": layout.out}
    gather: dict[Role, tuple[Move, ...]] = {}
    reduce: dict[Role, tuple[Move, ...]] = {}
    for role, spec in tensors.items():
        used = reading.compute_layout(spec).dims
        gather[role] = route(spec.dims, used)
        reduce[role] = route(used, spec.dims, reading.communicated_over(spec), (*spec.partial, *spec.grad_partial))
    product, bias = layout.out, reading.bias
    at_product = tuple(Dim(d.letter, product.axes_of(d.letter)) for d in bias.dims)
    at_gathered = tuple(Dim(d.letter, reading.compute_layout(product).axes_of(d.letter)) for d in bias.dims)
    missing = [axis for dim in product.dims if dim.letter not in bias.letters for axis in dim.axes]
    missing_gathered = [a for d in reading.compute_layout(product).dims if d.letter not in bias.letters for a in d.axes]
    return Plan(
        out_dims=product.dims,
        names={**{role: spec.name for role, spec in tensors.items()}, "bias": bias.name},
        gather=gather,
        reduce=reduce,
        bias=route(bias.dims, at_product),
        bias_grad=route(at_product, bias.dims, missing, bias.grad_partial),
        bias_grad_gathered=route(at_gathered, bias.dims, missing_gathered, bias.grad_partial),
        # A sum left to the caller must still be partial: then dY is read as stored, not as gathered.
        bias_can_share=all(axis in missing_gathered for axis in bias.grad_partial),
    )
