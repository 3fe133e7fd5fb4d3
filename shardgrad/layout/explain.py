"""A layout told in words and formulas."""

from __future__ import annotations

from collections.abc import Sequence

from shardgrad.layout.notation import Notation, TensorSpec
from shardgrad.layout.plan import Move, Plan, Role, backward_phases, forward_phases
from shardgrad.layout.rule import Reading

_VERB = {
    "all-gather": "all-gather {tensor} over {axis}",
    "reduce-scatter": "reduce-scatter {tensor} over {axis}",
    "all-reduce": "all-reduce {tensor} over {axis}",
    "slice": "keep this rank's part of {tensor} on {axis} (local)",
}


def explain(layout: Notation, reading: Reading, plan: Plan) -> str:
    """For forward, dX, dW and db: what is computed locally and what is communicated, on which axis."""
    lines = [str(layout), "", *_who_talks(layout, reading), ""]
    specs: dict[Role, TensorSpec] = {
        "lhs": layout.lhs,
        "rhs": layout.rhs,
        "out": layout.out,
        "bias": reading.bias,
    }
    with_bias = layout.bias is not None
    need: tuple[Role, ...] = ("lhs", "rhs", "bias")
    for phase in (*forward_phases([plan], [with_bias]), *backward_phases([plan], [need])):
        forward = phase.name == "forward"
        steps: list[str] = []
        for read in phase.reads:
            name = specs[read.role].name if forward or read.role != "out" else f"d{specs[read.role].name}"
            if read.role != "bias":
                steps += _moves(name, read.moves)
        made = specs[phase.made]
        if phase.made == "bias":
            gathered = plan.bias_reads_gathered(need)
            dims = reading.compute_layout(layout.out).dims if gathered else layout.out.dims
            dy = TensorSpec(f"d{layout.out.name}", dims)
            summed = [d.letter for d in dims if d.letter not in made.letters]
            sigma = f"Σ_{','.join(summed)} " if summed else ""
            steps.append(f"compute     db = {sigma}{dy}{' (as gathered above)' if dims != layout.out.dims else ''}")
            left = made.grad_partial
        else:
            target, left = (made, made.partial) if forward else (made.grad, made.grad_partial)
            operands = [reading.compute_layout(specs[read.role]) for read in phase.reads if read.role != "bias"]
            operands = [t if forward or t.name != layout.out.name else t.grad for t in operands]
            steps.append(f"compute     {formula(reading.compute_layout(target), operands, layout.spatial_letters)}")
        name = made.name if forward else "db" if phase.made == "bias" else f"d{made.name}"
        steps += _moves(name, phase.reduce)
        steps += [f"leave       {name} partial over {axis}: the caller sums it" for axis in left]
        if forward and with_bias:
            steps += _moves(reading.bias.name, plan.bias)
            steps.append(f"add         {reading.bias}, once{_after(phase.reduce, left)}")
        title = phase.name if phase.name != "db" or not with_bias else f"db, the gradient of {reading.bias}"
        if phase.name == "db" and not with_bias:
            title = f"db, if a bias {reading.bias} is added"
        lines += [title, *(f"  {step}" for step in steps)]
        if not any(m.kind != "slice" for m in (*phase.reduce, *(m for r in phase.reads for m in r.moves))):
            lines.append("  no communication")
    return "\n".join(lines)


def _after(reduce: Sequence[Move], left: Sequence[str]) -> str:
    if left:
        return f" (by the first rank of {', '.join(left)}, since the sum is left to the caller)"
    return ", after the reduction" if reduce else ""


def _who_talks(layout: Notation, reading: Reading) -> list[str]:
    lines = []
    for axis, letter in reading.splits.items():
        carriers = [t.name for t in (layout.lhs, layout.rhs, layout.out) if letter in t.letters]
        lacking = next((t for t in (layout.lhs, layout.rhs, layout.out) if letter not in t.letters), None)
        if lacking is None:
            lines.append(f"axis {axis} splits {letter}, which all three carry: nothing is communicated along it")
            continue
        stored = lacking.letter_with(axis)
        how = f"stores {axis} on {stored}" if stored else "is replicated over it"
        if lacking.partial or lacking.grad_partial:
            how += f", {{{','.join((*lacking.partial, *lacking.grad_partial))}}} left to the caller"
        lines.append(
            f"axis {axis} splits {letter} in {' and '.join(carriers)}; {lacking.name} lacks it, so {lacking.name} is "
            f"what is communicated along {axis} ({how})"
        )
    return lines or ["no axis: every rank computes the whole product"]


def _moves(name: str, moves: Sequence[Move]) -> list[str]:
    lines = []
    for move in moves:
        before = TensorSpec(name, move.before)
        after = TensorSpec(name, move.after)
        text = _VERB[move.kind].format(tensor=name, axis=move.axis)
        operation, _, rest = text.partition(" ")
        lines.append(f"{operation:<11} {rest}" + (f"   {before} -> {after}" if before.dims != after.dims else ""))
    return lines


def formula(made: TensorSpec, operands: Sequence[TensorSpec], spatial: Sequence[str] = ()) -> str:
    """A local product in letters, with the letters that it sums over (and those that windows move over)."""
    plain = TensorSpec(made.name, made.dims)
    known = (*made.letters, *spatial)
    letters = dict.fromkeys(letter for t in operands for letter in t.letters if letter not in known)
    sigma = f"Σ_{','.join(letters)} " if letters else ""
    times = " ∗ " if spatial else " "  # ∗: over windows
    return f"{plain} = {sigma}{times.join(str(TensorSpec(t.name, t.dims)) for t in operands)}"
