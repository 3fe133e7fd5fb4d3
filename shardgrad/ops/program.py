"""A plan made concrete for one set of shapes: which tensors to move, multiply and reduce, as slots of a list.

Slots hold the input (once for each way in which products gather it), the weights, the biases, and in backward each dY
as stored and as gathered. A slot whose tensor is on its way holds a `Transit`, waited for where it is first read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardgrad.comm.mesh import MeshView
from shardgrad.layout.layout import Layout
from shardgrad.layout.plan import Move, Phase, Plan, Read, Role, backward_phases, forward_phases, shares
from shardgrad.layout.sizes import Sizes
from shardgrad.ops.contract import Contraction
from shardgrad.ops.route import Step, Transit, steps
from shardgrad.ops.terms import Terms

Key = tuple[Role, int]
Route = tuple[Step, ...]
Slots = list[Tensor | Transit | None]


@dataclass(frozen=True, slots=True)
class Start:
    """Send the tensor of one slot on a route, into another slot (or the same)."""

    source: int
    target: int
    route: Route


@dataclass(frozen=True, slots=True)
class Stage:
    """One phase: what to start, what to compute, where it goes.

    starts: the gathers that this phase reads (first stage only), and those of the next phase, to run under this one.
    terms: the products to sum, as a contraction and the slots of its operands; none for db.
    bias: for db, the local mathematics and the slot of dY.
    route: of what is made, to where it is stored.
    output: its position among the results.
    done: slots that no later phase reads.
    """

    starts: tuple[Start, ...]
    terms: tuple[tuple[Contraction, int, int], ...]
    bias: tuple[Terms, int] | None
    route: Route
    output: int
    done: tuple[int, ...]


class Program:
    """Everything that calls of one set of shapes run, forward and backward."""

    def __init__(
        self,
        layouts: tuple[Layout, ...],
        biased: tuple[bool, ...],
        keep: frozenset[Key],
        view: MeshView,
        sizes: Sizes,
        reduce_dtype: torch.dtype | None,
        dtype: torch.dtype,
    ) -> None:
        self._view, self._sizes, self._reduce_dtype, self._dtype = view, sizes, reduce_dtype, dtype
        self._plans = [layout.plan for layout in layouts]
        self._terms = [Terms(layout, view) for layout in layouts]
        count = self.count = len(layouts)
        share = self._share = shares(self._plans)
        keys: list[Key] = [("first", at) for at in dict.fromkeys(share)]
        self._inputs = len(keys)
        keys += [("second", at) for at in range(count)]
        keys += [("bias", at) for at in range(count) if biased[at]]
        self._slot: dict[Key, int] = {key: at for at, key in enumerate(keys)}
        self._given = len(keys)  # then each dY as stored, then each as gathered
        self._dy_gathers = [bool(self._route(plan.gather["product"], "")) for plan in self._plans]
        self._biases = [at for at in range(count) if biased[at]]
        self._talks = [self._backward_talks(plan, biased[at]) for at, plan in enumerate(self._plans)]
        self._keep: set[Key] = {(role, share[at] if role == "first" else at) for role, at in keep}
        self._starts, self._forward = self._compile_forward(biased)
        self._saved: dict[tuple[bool, ...], tuple[int, ...]] = {}
        self._backward: dict[tuple[bool, ...], tuple[Stage, ...]] = {}

    # Compiling: from the plan's phases to slots.

    def _route(self, moves: tuple[Move, ...], name: str) -> Route:
        return steps(moves, name, self._view, self._sizes, self._reduce_dtype, self._dtype)

    def _backward_talks(self, plan: Plan, biased: bool) -> bool:
        """Whether the backward of one product communicates, beside the reduction of dX that products share."""
        routes = [*plan.gather.values(), plan.reduce["second"]]
        routes += [plan.bias_grad, plan.bias_grad_gathered] if biased else []
        return any(self._route(moves, "") for moves in routes)

    def _dy(self, at: int, gathered: bool = True) -> int:
        return self._given + at + (self.count if gathered and self._dy_gathers[at] else 0)

    def _compile_forward(
        self, biased: tuple[bool, ...]
    ) -> tuple[tuple[Start, ...], tuple[tuple[Terms, int, int, Route, int], ...]]:
        starts, products = [], []
        for phase in forward_phases(self._plans, biased):
            plan = self._plans[phase.index]
            slots = [self._slot[read.role, read.index] for read in phase.reads]
            for read, slot in zip(phase.reads, slots):
                route = self._route(read.moves, plan.names[read.role])
                if route:
                    starts.append(Start(slot, slot, route))
            reduce = self._route(phase.reduce, plan.names["product"])
            products.append((self._terms[phase.index], slots[0], slots[1], reduce, slots[2] if len(slots) > 2 else -1))
        return tuple(starts), tuple(products)

    def _compile_backward(self, flags: tuple[bool, ...]) -> tuple[Stage, ...]:
        """flags: whether X, each weight and each bias needs a gradient, then whether each dY is there."""
        needs: list[set[Role]] = []
        for at in range(self.count):
            need: set[Role] = set()
            if flags[len(flags) - self.count + at]:
                if flags[0]:
                    need.add("first")
                if flags[1 + at]:
                    need.add("second")
                if at in self._biases and flags[1 + self.count + self._biases.index(at)]:
                    need.add("bias")
            needs.append(need)
        phases = backward_phases(self._plans, needs, self._keep)
        gathers = [self._gathers(phase) for phase in phases]
        operands = [self._operands(phase, needs) for phase in phases]
        stages = []
        for at, phase in enumerate(phases):
            ahead = gathers[at + 1] if at + 1 < len(phases) else ()
            later = {slot for slots in operands[at + 1 :] for slot in slots}
            slots = operands[at]
            terms: list[tuple[Contraction, int, int]] = []
            if phase.made != "bias":
                for dy, other in zip(range(0, len(slots), 2), range(1, len(slots), 2)):
                    local = self._terms[phase.reads[dy].index]
                    made = local.grad_first if phase.made == "first" else local.grad_second
                    terms.append((made, slots[dy], slots[other]))
            stages.append(
                Stage(
                    starts=(*gathers[at], *ahead) if at == 0 else tuple(ahead),
                    terms=tuple(terms),
                    bias=None if terms else (self._terms[phase.index], slots[0]),
                    route=self._route(phase.reduce, phase.name),
                    output=self._output(phase),
                    done=tuple(set(slots) - later),
                )
            )
        return tuple(stages)

    def _gathers(self, phase: Phase) -> tuple[Start, ...]:
        starts = []
        for read in phase.reads:
            name = self._plans[read.index].names[read.role]
            route = self._route(read.moves, f"d{name}" if read.role == "product" else name)
            if route and read.role == "product":
                starts.append(Start(self._dy(read.index, gathered=False), self._dy(read.index), route))
            elif route:
                slot = self._slot[read.role, read.index]
                starts.append(Start(slot, slot, route))
        return tuple(starts)

    def _operands(self, phase: Phase, needs: Sequence[set[Role]]) -> list[int]:
        def slot(read: Read) -> int:
            if read.role != "product":
                return self._slot[read.role, read.index]
            gathered = phase.made != "bias" or self._plans[read.index].bias_reads_gathered(needs[read.index])
            return self._dy(read.index, gathered)

        return [slot(read) for read in phase.reads]

    def _output(self, phase: Phase) -> int:
        if phase.made == "first":
            return 0
        if phase.made == "second":
            return 1 + phase.index
        return 1 + self.count + self._biases.index(phase.index)

    # Running.

    def forward(self, x: Tensor, rest: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Y of every product; and the slots with what came in, or, where it is kept, as gathered."""
        given = [x] * self._inputs
        given += rest
        slots: Slots = [*given]
        for start in self._starts:
            slots[start.target] = Transit(given[start.source], start.route)
        made: list[Tensor | Transit] = []
        for terms, left, right, reduce, _ in self._forward:
            y = terms.product(_arrived(slots, left), _arrived(slots, right))
            made.append(Transit(y, reduce) if reduce else y)
        ys = []
        for out, (terms, _, _, _, bias) in zip(made, self._forward):
            y = out if isinstance(out, Tensor) else out.result()
            ys.append(y if bias < 0 else terms.add_bias(y, _arrived(slots, bias)))
        for key in self._keep:
            given[self._slot[key]] = _arrived(slots, self._slot[key])
        return ys, given

    def saved(self, flags: tuple[bool, ...]) -> tuple[int, ...]:
        """The slots that backward needs, given whether X, each weight and each bias needs a gradient."""
        found = self._saved.get(flags)
        if found is None:
            wanted = [("second", at) for at in range(self.count) if flags[0]]
            wanted += [("first", self._share[at]) for at in range(self.count) if flags[1 + at]]
            found = self._saved[flags] = tuple(dict.fromkeys(self._slot[key] for key in wanted))  # type: ignore[index]
        return found

    def backward(
        self, flags: tuple[bool, ...], saved: Sequence[Tensor], dys: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients of X, each weight and each bias; None where `flags` asks for none."""
        if len(dys) > 1 and any(dy is None for dy in dys):
            dys = self._with_zeros(dys)
        slots: Slots = [None] * self._given
        for slot, tensor in zip(self.saved(flags), saved):
            slots[slot] = tensor
        slots += dys
        slots += [None] * self.count
        key = flags + tuple([dy is not None for dy in dys])
        stages = self._backward.get(key)
        if stages is None:
            stages = self._backward[key] = self._compile_backward(key)
        grads: list[Tensor | None] = [None] * len(flags)
        leaving: list[tuple[int, Tensor | Transit]] = []
        for stage in stages:
            for start in stage.starts:
                source = slots[start.source]
                assert isinstance(source, Tensor)
                slots[start.target] = Transit(source, start.route)
            made: Tensor | None = None
            for contraction, dy, other in stage.terms:
                made = contraction(_arrived(slots, dy), _arrived(slots, other), made)
            if stage.bias is not None:
                made = stage.bias[0].grad_bias(_arrived(slots, stage.bias[1]))
            assert made is not None
            leaving.append((stage.output, Transit(made, stage.route) if stage.route else made))
            for slot in stage.done:
                slots[slot] = None
        for output, out in leaving:
            grad = out if isinstance(out, Tensor) else out.result()
            before = grads[output]
            grads[output] = grad if before is None else before + grad
        return grads

    def _with_zeros(self, dys: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Zeros for an output that this rank's loss did not use, where another rank's may have: all must take part."""
        like = next(dy for dy in dys if dy is not None)
        there = {self._share[at] for at, dy in enumerate(dys) if dy is not None}
        full = []
        for at, dy in enumerate(dys):
            shape = self._sizes.shape_of(self._plans[at].product_dims)
            absent = dy is None and (self._talks[at] or self._share[at] not in there)
            full.append(like.new_zeros(shape) if absent else dy)
        return full


def _arrived(slots: Slots, slot: int) -> Tensor:
    """The tensor of a slot, waited for if it is on its way."""
    tensor = slots[slot]
    if isinstance(tensor, Transit):
        tensor = slots[slot] = tensor.result()
    assert tensor is not None
    return tensor
