"""A plan made concrete for one set of shapes: which tensors to move, multiply and reduce, as numbered slots.

Slots stand for the input (once for each way in which products gather it), the weights, the biases, and in backward for
each dY as stored and as gathered. `source` writes a program out as Python, and that is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardgrad.comm import shim
from shardgrad.comm.agree import checking_every_call, every_call
from shardgrad.comm.mesh import MeshView
from shardgrad.layout.cost import sent
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.plan import Move, Phase, Plan, Read, Role, backward_phases, forward_phases, shares
from shardgrad.layout.sizes import Sizes
from shardgrad.ops import source
from shardgrad.ops.bilinear import Map, Operation
from shardgrad.ops.chunks import ChunkedGatherMatmul, ChunkedMatmulReduce, ChunkedRhsGatherMatmul
from shardgrad.ops.contract import Contraction
from shardgrad.ops.deferred import blocks, can_defer, defer, deferring
from shardgrad.ops.main_grad import in_use, main_grads
from shardgrad.ops.overlap import WHOLE, Chunking, choose, choose_together
from shardgrad.ops.route import Step, steps
from shardgrad.ops.stages import Forward, Piecewise, Route, Stage, Start
from shardgrad.ops.terms import Terms

Key = tuple[Role, int]
Check = Callable[[Sequence[Tensor | None]], None]


class Executable:
    """Everything that calls of one set of shapes run, forward and backward.

    needs: whether X, each weight and each bias that is there needs a gradient.
    check: called with what came to backward, before anything else, while ranks compare every call.
    traced: only to learn shapes from: ranks exchange nothing.
    """

    def __init__(
        self,
        layouts: tuple[Layout, ...],
        biased: tuple[bool, ...],
        save_gathered: frozenset[Key],
        view: MeshView,
        sizes: Sizes,
        reduce_dtype: torch.dtype | None,
        dtype: torch.dtype,
        needs: tuple[bool, ...],
        check: Check,
        operation: Operation,
        traced: bool,
    ) -> None:
        self._traced = traced
        self._view, self._sizes, self._reduce_dtype, self._dtype = view, sizes, reduce_dtype, dtype
        self._needs, self.check = needs, check
        self._layouts = layouts
        self._plans = [layout.plan for layout in layouts]
        self._terms = [Terms(layout, view, operation.local(layout, sizes)) for layout in layouts]
        count = self.count = len(layouts)
        share = self._share = shares(self._plans)
        keys: list[Key] = [("lhs", at) for at in dict.fromkeys(share)]
        self._inputs = len(keys)
        keys += [("rhs", at) for at in range(count)]
        keys += [("bias", at) for at in range(count) if biased[at]]
        self._slot: dict[Key, int] = {key: at for at, key in enumerate(keys)}
        self._given = len(keys)  # then each dY as stored, then each as gathered
        self._dy_gathers = [bool(self._route(plan.gather["out"], "")) for plan in self._plans]
        self._biases = [at for at in range(count) if biased[at]]
        self._talks = [self._backward_talks(plan, biased[at]) for at, plan in enumerate(self._plans)]
        self._save_gathered: set[Key] = {(role, share[at] if role == "lhs" else at) for role, at in save_gathered}
        self._saved = self._slots_for_backward()
        # Backward, by which dYs there are, whether the weights' gradients are put off, and which go to a main_grad.
        self._bodies: dict[tuple[tuple[bool, ...], bool, tuple[int, ...]], Callable[..., Any]] = {}
        self._biased = biased
        self._split: Callable[..., tuple[Tensor, ...]] | None = None
        self.function: type[torch.autograd.Function] | None = None
        # Every Y (a tensor if there is one), differentiably, of X, the weights and the biases that are there.
        self.call = self._build(biased)

    @property
    def source(self) -> str:
        """What runs, as Python: forward, and backward with every dY there."""
        bodies = [body for (has_grad, *_), body in self._bodies.items() if all(has_grad)]
        return "\n".join(str(function.__doc__) for function in (self._forward_body, *bodies))

    # Compiling: from the plan's phases to slots.

    def _route(self, moves: tuple[Move, ...], name: str) -> Route:
        return steps(moves, name, self._view, self._sizes, self._reduce_dtype, self._dtype)

    def _backward_talks(self, plan: Plan, biased: bool) -> bool:
        """Whether the backward of one product communicates, beside the reduction of dX that products share."""
        routes = [*plan.gather.values(), plan.reduce["rhs"]]
        routes += [plan.bias_grad, plan.bias_grad_gathered] if biased else []
        return any(self._route(moves, "") for moves in routes)

    def _dy(self, at: int, gathered: bool = True) -> int:
        return self._given + at + (self.count if gathered and self._dy_gathers[at] else 0)

    def _slots_for_backward(self) -> tuple[int, ...]:
        """W for dX, X for dW: as gathered if kept, else as stored, to be gathered again."""
        wanted: list[Key] = [("rhs", at) for at in range(self.count) if self._needs[0]]
        wanted += [("lhs", self._share[at]) for at in range(self.count) if self._needs[1 + at]]
        return tuple(dict.fromkeys(self._slot[key] for key in wanted))

    def _forward(
        self, biased: tuple[bool, ...]
    ) -> tuple[tuple[Start, ...], tuple[Forward, ...], tuple[Piecewise, ...]]:
        starts, products = [], []
        for phase in forward_phases(self._plans, biased):
            plan = self._plans[phase.index]
            slots = [self._slot[read.role, read.index] for read in phase.reads]
            for read, slot in zip(phase.reads, slots):
                route = self._route(read.moves, plan.names[read.role])
                if route:
                    starts.append(Start(slot, slot, route))
            reduce = self._route(phase.reduce, plan.names["out"])
            bias = slots[2] if len(slots) > 2 else None
            products.append(Forward(self._terms[phase.index], slots[0], slots[1], reduce, bias))
        gathers = []
        for start in starts:
            readers = [at for at, one in enumerate(products) if one.lhs == start.target]
            if readers:
                made: list[tuple[int, Map, Role]]
                made = [(at, products[at].terms.out, "out") for at in readers]
                gathers.append(
                    self._gather_in_chunks(start, made, self._slot_role(start.target) in self._save_gathered)
                )
        piecewise = tuple(gather for gather in gathers if gather is not None)
        overlap_with = {gather.start.target for gather in piecewise}
        last = len(products) - 1
        if products[last].lhs not in overlap_with:
            reduced = self._reduce_in_chunks(products[last].route, last, products[last].terms.out, "out")
            products[last] = replace(products[last], chunks=reduced)
        first = products[0]  # what later ones read arrives under this one
        if first.lhs not in overlap_with and first.chunks is None:
            for start in starts:
                if start.target == first.rhs:
                    kept = self._slot_role(start.target) in self._save_gathered
                    weight = self._gather_rhs_in_chunks(start, 0, first.terms.out, "out", kept)
                    piecewise += (weight,) if weight is not None else ()
        return tuple(starts), tuple(products), piecewise

    def _slot_role(self, slot: int) -> Key | None:
        return next((key for key, at in self._slot.items() if at == slot), None)

    def _backward(self, has_grad: tuple[bool, ...], defer: bool) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """The stages of backward, given which of the dYs there are; and those left for later, if any are to be."""
        needs: list[set[Role]] = []
        for at in range(self.count):
            need: set[Role] = set()
            if has_grad[at]:
                if self._needs[0]:
                    need.add("lhs")
                if self._needs[1 + at]:
                    need.add("rhs")
                if at in self._biases and self._needs[1 + self.count + self._biases.index(at)]:
                    need.add("bias")
            needs.append(need)
        phases = backward_phases(self._plans, needs, self._save_gathered)
        if not defer:
            phases = self._best_order(phases)
        gathers = [self._gathers(phase) for phase in phases]
        operands = [self._operands(phase, needs) for phase in phases]
        stages = []
        now = len([phase for phase in phases if phase.made == "lhs"]) if defer else len(phases)  # these come first
        for at, phase in enumerate(phases):
            ahead = gathers[at + 1] if at + 1 < len(phases) and at + 1 != now else ()
            later = {slot for slots in operands[at + 1 :] for slot in slots}
            slots = operands[at]
            terms: list[tuple[Map, int, int]] = []
            if phase.made != "bias":
                for dy, other in zip(range(0, len(slots), 2), range(1, len(slots), 2)):
                    local = self._terms[phase.reads[dy].index]
                    made = local.grad_lhs if phase.made == "lhs" else local.grad_rhs
                    terms.append((made, slots[dy], slots[other]))
            stages.append(
                Stage(
                    starts=(*gathers[at], *ahead) if at in (0, now) else tuple(ahead),
                    terms=tuple(terms),
                    bias=None if terms else (self._terms[phase.index], slots[0]),
                    route=self._route(phase.reduce, phase.name),
                    output=self._output(phase),
                    done=tuple(set(slots) - later),
                )
            )
        if stages and phases[0].made == "lhs":
            stages[0] = self._gather_in_stage(stages[0], phases[0].reads[0].index, operands)
            if now > 1:
                rest = [phase.index for phase in phases[1:now] if phase.made != "bias"]
                following_flops = 2 * sum(self._multiplications(index) for index in rest)
                stages[0] = self._reduce_in_stage(stages[0], phases[0], following_flops)
        for end in {now - 1, len(phases) - 1}:
            if end >= 0:
                stages[end] = self._reduce_in_stage(stages[end], phases[end])
        return tuple(stages[:now]), tuple(stages[now:])

    def _gather_in_stage(self, stage: Stage, at: int, operands: Sequence[list[int]]) -> Stage:
        """dX side by side with the gather of dY or W that it reads."""
        if len(stage.terms) != 1:
            return stage
        made, dy, weight = stage.terms[0]
        for start in stage.starts:
            if start.target == dy:
                again = any(dy in slots for slots in operands[1:])
                gather = self._gather_in_chunks(start, [(at, made, "lhs")], again)
                return stage if gather is None else replace(stage, gather=gather)
        for start in stage.starts:
            if start.target == weight:
                return replace(stage, gather=self._gather_rhs_in_chunks(start, at, made, "lhs", False))
        return stage

    def _reduce_in_stage(self, stage: Stage, phase: Phase, following_flops: int = 0) -> Stage:
        """A gradient side by side with its reduction, which has only so many multiplications and additions to run
        behind otherwise: the last one, none."""
        if len(stage.terms) != 1 or stage.gather is not None or stage.chunks is not None:
            return stage
        made, at = stage.terms[0][0], phase.reads[0].index
        return replace(stage, chunks=self._reduce_in_chunks(stage.route, at, made, phase.made, following_flops))

    def _cuttable(self, route: Route, at: int, made: Map, moved: TensorSpec) -> tuple[Step, bool] | None:
        """The one step of a route, if what it moves and the product can be cut into pieces; and whether all ranks of
        its axis know the same sizes, and so decide alike."""
        if len(route) != 1 or not isinstance(made, Contraction) or not made.rows:
            return None
        step, layout, same_on_all_ranks = route[0], self._layouts[at], True
        assert step.axis is not None
        for spec in (layout.lhs, layout.rhs, layout.out):
            for dim in spec.dims:
                if step.axis.name in dim.axes:
                    whole = self._sizes.get(dim.letter, dim.axes[: dim.axes.index(step.axis.name)])
                    if whole is None or whole % step.axis.size:
                        if dim.letter in moved.letters:
                            return None
                        same_on_all_ranks = False
        return step, same_on_all_ranks

    def _reduce_in_chunks(
        self, route: Route, at: int, made: Map, role: Role, following_flops: int = 0
    ) -> ChunkedMatmulReduce | None:
        if role == "bias":
            return None
        found = self._cuttable(route, at, made, self._spec(at, role))
        if found is None or found[0].kind not in ("all-reduce", "reduce-scatter"):
            return None
        assert isinstance(made, Contraction)
        step, same_on_all_ranks = found
        shape = self._used_shape(at, role)
        rows, columns = prod(shape[: made.rows]), prod(shape[made.rows :])
        inner = self._multiplications(at) // max(1, rows * columns)
        # Cut along rows, the second matrix is read again and again; along columns, the first, and all is copied once.
        by_rows = columns * inner <= rows * (inner + columns)
        if step.kind == "reduce-scatter":
            by_rows = step.dim >= made.rows
        elif not same_on_all_ranks:
            by_rows = rows >= columns
        chunking = self._chunking(
            step, same_on_all_ranks, shape, at, 1, (columns if by_rows else rows) * inner, None, following_flops
        )
        return ChunkedMatmulReduce(made, step, chunking, by_rows=by_rows) if chunking != WHOLE else None

    def _gather_in_chunks(
        self, start: Start, products: Sequence[tuple[int, Map, Role]], assemble: bool
    ) -> Piecewise | None:
        at, _, role = products[0]
        spec = self._spec(at, "lhs" if role == "out" else "out")
        found = [self._cuttable(start.route, index, made, spec) for index, made, _ in products]
        contractions = [made for _, made, _ in products if isinstance(made, Contraction)]
        if found[0] is None or None in found or found[0][0].kind != "all-gather":
            return None
        step, same_on_all_ranks = found[0][0], all(one is not None and one[1] for one in found)
        if any(step.dim >= made.rows or not made.lhs_has_rows for made in contractions):
            return None
        assert step.axis is not None
        stored = self._sizes.shape_of(spec.dims)
        if stored[step.dim] * step.axis.size != step.global_size:
            return None
        reread = sum(prod(self._used_shape(index, "rhs")) for index, _, _ in products) * (step.axis.size - 1)
        chunking = self._chunking(step, same_on_all_ranks, stored, at, len(products), reread, 1 / step.axis.size)
        return (
            Piecewise(start, ChunkedGatherMatmul(contractions, step, chunking, assemble=assemble))
            if chunking != WHOLE
            else None
        )

    def _gather_rhs_in_chunks(self, start: Start, at: int, made: Map, role: Role, assemble: bool) -> Piecewise | None:
        """The gather of a weight beside the product, Y or dX, that reads it."""
        second, out = self._spec(at, "rhs"), self._spec(at, role)
        found = self._cuttable(start.route, at, made, second)
        if found is None or found[0].kind != "all-gather":
            return None
        assert isinstance(made, Contraction)
        step, same_on_all_ranks = found
        assert step.axis is not None
        stored = self._sizes.shape_of(second.dims)
        places = {letter: out.letters.index(letter) for letter in second.letters if letter in out.letters}
        if stored[step.dim] * step.axis.size != step.global_size or not places:
            return None
        gathered = second.letters[step.dim]
        # A letter that is whole here leaves whole pieces; the gathered one, the own shard's part to begin with.
        letter = max(places, key=lambda one: (one != gathered, stored[second.letters.index(one)]))
        local_fraction = 1 / step.axis.size if letter == gathered else 0.0
        left = prod(self._used_shape(at, "lhs" if role == "out" else "out"))
        chunking = self._chunking(
            step, same_on_all_ranks, stored, at, 1, left * (step.axis.size - 1 if local_fraction else 1), local_fraction
        )
        if chunking == WHOLE:
            return None
        along, place = second.letters.index(letter), places[letter]
        return Piecewise(start, ChunkedRhsGatherMatmul(made, step, chunking, along, place, assemble=assemble))

    def _spec(self, at: int, role: Role) -> TensorSpec:
        layout = self._layouts[at]
        return {"lhs": layout.lhs, "rhs": layout.rhs, "out": layout.out}[role]

    def _used_shape(self, at: int, role: Role) -> tuple[int, ...]:
        return self._sizes.shape_of(self._layouts[at].reading.compute_layout(self._spec(at, role)).dims)

    def _best_order(self, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        """dX before dW, so that its reduction runs under dW's product; the other way round where only dW is reduced."""
        first = [phase for phase in phases if phase.made == "lhs"]
        rest = [phase for phase in phases if phase.made != "lhs"]
        reduced = [any(self._route(phase.reduce, "") for phase in some) for some in (first, rest)]
        if reduced == [False, True] and not any(self._dy_gathers):
            return (*rest, *first)
        return phases

    def _gathers(self, phase: Phase) -> tuple[Start, ...]:
        starts = []
        for read in phase.reads:
            name = self._plans[read.index].names[read.role]
            route = self._route(read.moves, f"d{name}" if read.role == "out" else name)
            if route and read.role == "out":
                starts.append(Start(self._dy(read.index, gathered=False), self._dy(read.index), route))
            elif route:
                slot = self._slot[read.role, read.index]
                starts.append(Start(slot, slot, route))
        return tuple(starts)

    def _operands(self, phase: Phase, needs: Sequence[set[Role]]) -> list[int]:
        def slot(read: Read) -> int:
            if read.role != "out":
                return self._slot[read.role, read.index]
            gathered = phase.made != "bias" or self._plans[read.index].bias_reads_gathered(needs[read.index])
            return self._dy(read.index, gathered)

        return [slot(read) for read in phase.reads]

    def _output(self, phase: Phase) -> int:
        if phase.made == "lhs":
            return 0
        if phase.made == "rhs":
            return 1 + phase.index
        return 1 + self.count + self._biases.index(phase.index)

    # Running.

    def _multiplications(self, at: int) -> int:
        """Of one product, on this rank."""
        layout = self._layouts[at]
        sizes: dict[str, int] = {}
        for spec, role in ((layout.lhs, "lhs"), (layout.rhs, "rhs")):
            sizes.update(zip(spec.letters, self._used_shape(at, role)))  # type: ignore[arg-type]
        return prod(sizes.values())

    def _chunking(
        self,
        step: Step,
        same_on_all_ranks: bool,
        moved: tuple[int, ...],
        at: int,
        products: int,
        reread: int,
        local_fraction: float | None,
        following_flops: int = 0,
    ) -> Chunking:
        """The pieces in which to do a product with one of its collectives, which is given a tensor of shape `moved`.

        reread: elements that each piece beyond the first reads once more. local_fraction, following_flops: see
        `Costs.chunks`.
        """
        assert step.axis is not None
        size, name = self._dtype.itemsize, step.axis.name
        count = sent(step.kind, prod(moved), step.axis.size) * size
        flops = 2 * products * self._multiplications(at)

        def choice() -> Chunking:
            return choose(self._view, name, count, flops, reread * size, self._dtype, local_fraction, following_flops)

        if same_on_all_ranks:
            return choice() if flops else WHOLE
        if self._traced or not prod(moved):
            return WHOLE
        what = f"{step.what} {moved} beside products of {self._layouts[at]}, {self._dtype}"
        return choose_together(self._view, step.axis, what, choice)

    def _names(self) -> list[str]:
        """What each slot is called in the source."""
        firsts = ["x", *(f"x{at}" for at in range(1, self._inputs))]
        tail = range(self.count) if self.count > 1 else ("",)
        biases = [f"b{at if self.count > 1 else ''}" for at in self._biases]
        return [*firsts, *(f"w{at}" for at in tail), *biases, *(f"dy{at}" for at in tail), *(f"dy{at}_" for at in tail)]

    def _build(self, biased: tuple[bool, ...]) -> Callable[..., Any]:
        """What a call runs: an autograd Function of its own, or plain code where nothing needs a gradient."""
        keep = {self._slot[key] for key in self._save_gathered}
        wanted = any(self._needs)
        forward = self._forward_body = source.forward(
            *self._forward(biased), self._names(), self._inputs, self._given, self._saved, keep, in_autograd=wanted
        )
        if not wanted:
            return forward
        all_have_grads = (True,) * self.count
        usual = self._bodies[all_have_grads, False, ()] = self._body(all_have_grads, False, ())
        unusual, several = self._run_backward, self.count > 1
        refusing = once_differentiable(unusual)

        def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # a graph of the gradients is wanted: refused if it is used
                return refusing(ctx, *dys)
            if every_call or blocks or in_use or dys[0] is None or (several and [dy for dy in dys if dy is None]):
                return unusual(ctx, *dys)
            return usual(ctx.saved_tensors, *dys)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.function = type("ShardedProduct", (torch.autograd.Function,), members)
        return shim.call_of(self.function)

    def _body(self, has_grad: tuple[bool, ...], defer: bool, into: tuple[int, ...]) -> Callable[..., Any]:
        stages = self._backward(has_grad, defer)
        return source.backward(*stages, self._names(), self._saved, self._given, len(self._needs), has_grad, into)

    def _run_backward(self, ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of X, each weight and each bias; None where none is needed, or where it goes another way."""
        if checking_every_call():
            self.check(dys)
        has_grad = tuple([dy is not None for dy in dys])
        if self.count > 1 and not all(has_grad):
            dys = self._with_zeros(dys)
            has_grad = tuple([dy is not None for dy in dys])
        later = deferring() and can_defer(ctx, slice(1, None))
        mains = main_grads(ctx) if in_use else {}
        key = has_grad, later, tuple(mains)
        body = self._bodies.get(key)
        if body is None:
            body = self._bodies[key] = self._body(*key)
        grads = body(ctx.saved_tensors, *dys, *mains.values())
        if len(grads) > len(self._needs):
            *grads, rest = grads
            defer(ctx, rest)
        return tuple(grads)

    def _with_zeros(self, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Zeros for an output that this rank's loss did not use, where another rank's may have: all must take part."""
        like = next((dy for dy in dys if dy is not None), None)
        if like is None:
            return tuple(dys)
        wanted = self._computed([dy is not None for dy in dys])
        full = []
        for at, dy in enumerate(dys):
            absent = dy is None and wanted[at]
            full.append(like.new_zeros(self._sizes.shape_of(self._plans[at].out_dims)) if absent else dy)
        return tuple(full)

    def _computed(self, has_grad: Sequence[bool]) -> tuple[bool, ...]:
        """Which products have a backward, given the dYs that there are: theirs, and those where all must take part."""
        used = {self._share[at] for at in range(self.count) if has_grad[at]}
        if self.count == 1 or not used:
            return tuple(has_grad)
        return tuple([has_grad[at] or self._talks[at] or self._share[at] not in used for at in range(self.count)])

    # Forward and backward apart, with what backward needs in the hands of the caller: torch.compile's.

    def split_forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Every Y, and then the operands that backward reads as gathered."""
        if self._split is None:
            keep = {self._slot[key] for key in self._save_gathered}
            self._split = source.forward(
                *self._forward(self._biased),
                self._names(),
                self._inputs,
                self._given,
                self._saved,
                keep,
                in_autograd=False,
                with_kept=True,
            )
        return self._split(*tensors)

    def _kept_slots(self) -> list[int]:
        keep = {self._slot[key] for key in self._save_gathered}
        return [slot for slot in self._saved if slot in keep]

    def split_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of what `split_forward` returns."""
        kept = [key for slot in self._kept_slots() if (key := self._slot_role(slot)) is not None]
        made = [self._sizes.shape_of(plan.out_dims) for plan in self._plans]
        return [*made, *(self._used_shape(at, role) for role, at in kept)]

    def split_saved(self, tensors: Sequence[Tensor], returned: Sequence[Tensor]) -> list[Tensor]:
        """What backward reads, of the inputs of `split_forward` and of what it returned."""
        kept = dict(zip(self._kept_slots(), returned[self.count :]))
        inputs = {slot: tensors[max(0, slot - self._inputs + 1)] for slot in self._saved}
        return [kept.get(slot, inputs[slot]) for slot in self._saved]

    def split_gradients(self, has_grad: Sequence[bool]) -> list[bool]:
        """For X, each weight and each bias, whether backward makes a gradient, given the dYs that there are."""
        computed = self._computed(has_grad)
        at = [*range(self.count), *self._biases]
        made = [any(computed), *(computed[index] for index in at)]
        return [need and is_made for need, is_made in zip(self._needs, made)]

    def split_backward(self, saved: Sequence[Tensor], dys: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients that there are."""
        dys = self._with_zeros(dys)
        has_grad = tuple([dy is not None for dy in dys])
        key = has_grad, False, ()
        body = self._bodies.get(key)
        if body is None:
            body = self._bodies[key] = self._body(*key)
        return [grad for grad in body(tuple(saved), *dys) if grad is not None]
