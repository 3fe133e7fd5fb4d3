"""Exact mode: the same bits on any number of ranks, as a pass over the instructions.

An axis of p ranks cuts every letter that it splits into V pieces, whatever p; a rank holds V/p of them, one behind the
other. Products read and make single pieces, so that the multiplier is given the same matrices on any p; and the V terms
of a sum are added in one tree (`layout.tree`): a rank adds up those that it has, the reduction the rest. Whatever is
gathered only moves. With V = p nothing is cut.

A sum over several letters is a tree of trees, the inner ones reduced first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from shardgrad.errors import LayoutError
from shardgrad.layout.lower import Products
from shardgrad.layout.notation import Dim
from shardgrad.layout.plan import Move
from shardgrad.layout.schedule import (
    Cast,
    Communicate,
    Defer,
    Fold,
    Hold,
    InPieces,
    Instruction,
    Instructions,
    Matmul,
    Return,
    Same,
    Slice,
    SumBias,
    Term,
    Wait,
)
from shardgrad.layout.tree import Cut, Level, side_by_side, summed


def in_pieces(instructions: Sequence[Instruction], products: Products, hold: str | None = None) -> Instructions:
    """Products in pieces, and reductions that add in the tree.

    hold: an axis, whose pieces come in several micro-batches: the gradients of weights and biases are kept until the
        last of them.

    Raises:
        LayoutError: an axis does not cut a letter evenly, or no tree over ranks, or over micro-batches, is one over
            pieces.
    """
    made = _Pass(products).apply(instructions)
    return made if hold is None else tuple(_held_back(made, products, hold))


@dataclass
class _Sum:
    """A value that products make: its terms, the cast to the dtype of the sum, and the reductions."""

    terms: list[Matmul | SumBias] = field(default_factory=list)
    wide: Cast | None = None
    reductions: list[Communicate] = field(default_factory=list)


class _Pass:
    def __init__(self, products: Products) -> None:
        self.products, self.sizes = products, products.sizes
        self.pieces = products.pieces or {}

    def apply(self, instructions: Sequence[Instruction]) -> Instructions:
        now: dict[int, list[Instruction]] = {}  # in place of an instruction
        then: dict[int, list[Instruction]] = {}  # behind the wait for a reduction
        for value in self._sums(instructions):
            self._put(value, now, then)
        found: list[Instruction] = []
        for one in instructions:
            if isinstance(one, Defer):
                found.append(replace(one, body=self.apply(one.body)))
            elif isinstance(one, Communicate | Wait) and self._is_gather_of_one(one):
                found += [Same(one.phase, one.out, one.src)] if isinstance(one, Communicate) else []
            elif isinstance(one, Wait) and id(one.started) in now:
                for started in now[id(one.started)]:
                    assert isinstance(started, Communicate)
                    found += [replace(one, started=started), *then[id(one.started)]]
            elif id(one) in now:
                found += now[id(one)]
                found += then[id(one)] if isinstance(one, Communicate) and one.blocking else []
            else:
                found.append(one)
        return tuple(_behind_leading_dims(found))

    def _is_gather_of_one(self, one: Communicate | Wait) -> bool:
        moved = one.started if isinstance(one, Wait) else one
        return moved.move.kind == "all-gather" and self.sizes.shape[moved.move.axis] == 1

    def _sums(self, instructions: Sequence[Instruction]) -> list[_Sum]:
        found: dict[str, _Sum] = {}
        for one in instructions:
            if isinstance(one, Matmul | SumBias):
                found.setdefault(one.out, _Sum()).terms.append(one)
            elif isinstance(one, Cast) and one.src in found and not found[one.src].reductions:
                found[one.src].wide = one
            elif isinstance(one, Communicate) and one.move.kind != "all-gather" and one.src in found:
                found[one.src].reductions.append(one)
        return list(found.values())

    def _put(self, one: _Sum, now: dict[int, list[Instruction]], then: dict[int, list[Instruction]]) -> None:
        """What becomes of the products, the cast and the reductions of one value."""
        first = one.terms[0]
        levels = self._levels(first, [reduction.move.axis for reduction in one.reductions])
        last = next((at for at, level in enumerate(levels) if level.ranks > 1), len(levels) - 1)  # summed by the rank
        later = [level for level in reversed(levels[last + 1 :]) if level.count > 1]  # outermost first
        now.update({id(term): [] for term in one.terms})
        now[id(one.terms[-1])] = [
            InPieces(
                first.phase,
                first.out,
                tuple(self._term(term, [*levels[: last + 1], *later]) for term in one.terms),
                tuple(levels[: last + 1]),
                tuple(later),
                side_by_side(levels[last]) if levels else 0,
                None if one.wide is None else one.wide.dtype,
            )
        ]
        if one.wide is not None:
            now[id(one.wide)] = []
        moves = self._in_order(one, levels)
        behind: list[Instruction] = []
        for at, level in enumerate(levels):
            left = [other for other in levels[at + 1 :] if other.count > 1]
            if at > last and level.count > 1:
                behind.append(Fold(first.phase, first.out, level, side_by_side(level), len(left)))
            for cut in level.cuts:
                reduction, move = moves.pop(0)
                now[id(reduction)], then[id(reduction)] = [], []
                if cut.ranks > 1:
                    behind = then[id(reduction)]
                    now[id(reduction)] = [replace(reduction, move=move, summed=summed(level, cut.axis, left))]

    def _levels(self, term: Matmul | SumBias, axes: Sequence[str]) -> list[Level]:
        """The sums that a value is, innermost first: axes that cut one letter are one level, the minor ones first."""
        letters = self._letters(term)
        of = {axis: letter for letter, cuts in letters.items() for axis in cuts}
        found = []
        for letter in dict.fromkeys(of[axis] for axis in axes):
            mine = [axis for axis in reversed(letters[letter]) if axis in axes]
            cuts = (Cut(a, self.pieces[a], self.sizes.shape[a], self.sizes.coordinate[a]) for a in mine)
            found.append(Level(tuple(cuts)))
        return found

    def _letters(self, term: Matmul | SumBias) -> dict[str, tuple[str, ...]]:
        """The axes that cut each letter of what a term reads, major first."""
        axes = _axes_read(term, self.products)
        return {letter: tuple(a for a in cuts if self.pieces[a] > 1) for letter, cuts in axes.items()}

    def _term(self, term: Matmul | SumBias, levels: Sequence[Level]) -> Term:
        plan, letters = self.products.plans[term.index], self._letters(term)
        if isinstance(term, SumBias):
            operands, out = [term.letters[0]], term.letters[1]
        else:
            operands, out = [plan.letters[role] for role in term.operands], plan.letters[term.role]
            operands += [plan.letters["bias"]] if term.bias is not None else []
        read = dict.fromkeys(letter for operand in operands for letter in operand)
        counts = {x: prod(self.pieces[a] // self.sizes.shape[a] for a in letters.get(x, ())) for x in read}
        for x, count in counts.items():
            size = self.sizes.get(x, letters.get(x, ()))
            if size is not None and size % count:
                raise LayoutError(
                    f"exact mode: {'/'.join((x, *letters[x]))} = {size} on this rank is not {count} equal pieces"
                )
        of = {axis: letter for letter, cuts in letters.items() for axis in cuts}
        summed_letters = []
        for level in levels:
            cut = {of.get(axis) for axis, *_ in level.cuts}
            if len(cut) != 1 or None in cut:
                raise LayoutError(
                    f"exact mode: the axes {', '.join(axis for axis, *_ in level.cuts)} do not cut one letter in every "
                    f"product whose gradients of {plan.names['lhs']} are added"
                )
            summed_letters.append(str(cut.pop()))
        return Term(
            term, tuple(operands), out, tuple((x, n) for x, n in counts.items() if n > 1), tuple(summed_letters)
        )

    def _in_order(self, one: _Sum, levels: Sequence[Level]) -> list[tuple[Communicate, Move]]:
        """Each reduction, in its place, and what it is to move: along minor axes before major ones."""
        order = [axis for level in levels for axis, *_ in level.cuts]
        moves = {reduction.move.axis: reduction.move for reduction in one.reductions}
        wanted = [moves[axis] for axis in order]
        for dim in {move.dim for move in wanted if move.kind == "reduce-scatter"}:
            before, after = ([m.axis for m in some if m.dim == dim] for some in (moves.values(), wanted))
            if before != after:
                raise LayoutError(
                    f"exact mode: the sum is scattered over {'/'.join(before)}, but the pieces of its letter lie along "
                    f"{'/'.join(reversed(after))}: a tree over pieces is then none over ranks. Let the axes stand in "
                    "the opposite order on one of the two letters"
                )
        return list(zip(one.reductions, wanted))


def _axes_read(term: Matmul | SumBias, products: Products) -> dict[str, tuple[str, ...]]:
    """The axes that shard each letter of what a term reads, major first."""
    plan = products.plans[term.index]
    if isinstance(term, SumBias) and not term.gathered:
        return {dim.letter: dim.axes for dim in plan.stored["out"]}
    return plan.splitting


def _behind_leading_dims(instructions: Sequence[Instruction]) -> Iterator[Instruction]:
    """Gathers and slices of sums that are not whole yet, as a bias's gradient has them, along the dims of the tensor:
    those behind the dims of nodes, and of sums that are taken later."""
    lead: dict[str, int] = {}
    moved: dict[int, Communicate] = {}
    for one in instructions:
        if isinstance(one, InPieces):
            lead[one.out] = (one.held > 0) + len(one.later)
        elif isinstance(one, Fold):
            lead[one.out] = (one.held > 0) + one.lead
        elif isinstance(one, Communicate) and one.summed is not None:
            lead[one.out] = (one.summed.held[1] > 0) + one.summed.lead
        elif isinstance(one, Cast | Same | Slice | Communicate):
            before = lead[one.out] = lead.get(one.src, 0)
            if before and isinstance(one, Slice):
                one = replace(one, move=_shifted(one.move, before))
            elif before and isinstance(one, Communicate):
                moved[id(one)] = one = replace(one, move=_shifted(one.move, before))
        elif isinstance(one, Wait):
            one = replace(one, started=moved.get(id(one.started), one.started))
        yield one


def _shifted(move: Move, dims: int) -> Move:
    more = (Dim(""),) * dims
    return replace(move, dim=move.dim + dims, before=(*more, *move.before), after=(*more, *move.after))


def _held_back(instructions: Instructions, products: Products, axis: str) -> Iterator[Instruction]:
    """Each gradient of a weight or a bias held before it is handed on, in the dtype in which it is summed."""
    [end] = [one for one in instructions if isinstance(one, Return)]
    results = {value: at for at, value in enumerate(end.results) if at and value is not None}
    last = {one.out: one for one in instructions if isinstance(one, Cast) and one.out in results}
    for one in instructions:
        if isinstance(one, InPieces) and one.out in results:
            _check_outermost(one.terms[0].made, products, axis)
        if one is end:
            for value, at in results.items():
                yield Hold("hold", value, at, products.reduce_dtype, products.reduce_dtype and products.dtype)
        if not (isinstance(one, Cast) and last.get(one.out) is one):
            yield one


def _check_outermost(made: Matmul | SumBias, products: Products, axis: str) -> None:
    """Micro-batches are the outermost nodes of the tree: so must their axis be among those that the sum is over."""
    plan, pieces = products.plans[made.index], products.pieces or {}
    letters = _axes_read(made, products)
    if isinstance(made, Matmul):
        route = plan.reduce[made.role]
    else:
        route = plan.bias_grad_gathered if made.gathered else plan.bias_grad
    over = [move.axis for move in route if move.kind in ("all-reduce", "reduce-scatter")]
    over = [one for one in over if one == axis or pieces[one] > 1]
    letter = next((letter for letter, cuts in letters.items() if axis in cuts), None)
    name = plan.names[made.role] if isinstance(made, Matmul) else plan.names["bias"]
    if letter is None or axis not in over:
        raise LayoutError(
            f"exact mode: micro-batches are parts of a batch that axis {axis} shards, and the gradient of {name} is "
            "not summed over it"
        )
    mine = [one for one in letters[letter] if one in over]
    last = next(x for one in reversed(over) for x, cuts in letters.items() if one in cuts)
    each = prod(pieces[one] for one in mine)
    if mine[0] != axis or last != letter or each & (each - 1):
        raise LayoutError(
            f"exact mode: the gradient of {name} is summed over {', '.join(over)}, not over {axis} last, as "
            "micro-batches are added: do without sg.micro_batches"
        )


def uneven(products: Products) -> tuple[str, int, int] | None:
    """A letter that its axes do not cut evenly, its size, and in how many pieces it should be; if any.

    Of the whole letter where its size is known, as all ranks know it; else of this rank's part.
    """
    pieces, sizes = products.pieces or {}, products.sizes
    for plan in products.plans:
        for letter, axes in plan.splitting.items():
            whole, local = sizes.get(letter, ()), sizes.get(letter, axes)
            count = prod(pieces[axis] for axis in axes)
            if whole is not None and whole % count:
                return letter, whole, count
            here = prod(pieces[axis] // sizes.shape[axis] for axis in axes)
            if whole is None and local is not None and local % here:
                return f"{'/'.join((letter, *axes))} on this rank", local, here
    return None
