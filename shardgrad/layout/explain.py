"""A layout in words and formulas."""

from __future__ import annotations

from collections.abc import Sequence

from shardgrad.layout.lower import Products, backward, forward
from shardgrad.layout.notation import Notation, TensorSpec
from shardgrad.layout.plan import Move, Plan, Role
from shardgrad.layout.rule import Reading
from shardgrad.layout.schedule import AddBias, Communicate, Instruction, Matmul, Slice, SumBias, phases
from shardgrad.layout.sizes import Sizes

_VERB = {
    "all-gather": "all-gather {tensor} over {axis}",
    "reduce-scatter": "reduce-scatter {tensor} over {axis}",
    "all-reduce": "all-reduce {tensor} over {axis}",
    "slice": "keep this rank's part of {tensor} on {axis} (local)",
}


def explain(layout: Notation, reading: Reading, plan: Plan) -> str:
    """For forward, dX, dW and db: what is computed locally and what is communicated, on which axis."""
    lines = [str(layout), "", *_communicated(layout, reading), ""]
    mesh = dict.fromkeys(reading.splits, 2)  # any axis of more than one rank is described alike
    sizes = Sizes(mesh, dict.fromkeys(mesh, 0))
    need: list[set[Role]] = [{"lhs", "rhs", "bias"}]
    with_bias = layout.bias is not None
    made = forward(Products((plan,), (with_bias,), sizes, contraction=False))
    gradients = backward(Products((plan,), (True,), sizes), need)
    for phase, instructions in phases((*made, *gradients)).items():
        title = phase
        if phase == "db":
            title = f"db, the gradient of {reading.bias}" if with_bias else f"db, if a bias {reading.bias} is added"
        lines += [title, *(f"  {line}" for one in instructions for line in _lines(one, layout, reading))]
        lines += [f"  {left}" for left in _left(phase, layout, reading)]
        if not any(isinstance(one, Communicate) for one in instructions):
            lines.append("  no communication")
    return "\n".join(lines)


def _lines(one: Instruction, layout: Notation, reading: Reading) -> list[str]:
    """The lines for one instruction."""
    specs: dict[Role, TensorSpec] = {"lhs": layout.lhs, "rhs": layout.rhs, "out": layout.out, "bias": reading.bias}
    if isinstance(one, Communicate | Slice):
        return [_move(one.tensor, one.move)]
    if isinstance(one, Matmul):
        forward = one.role == "out"
        made = specs[one.role] if forward else specs[one.role].grad
        operands = [specs[role] if role != "out" else specs[role].grad for role in one.operands]
        compute = [reading.compute_layout(spec) for spec in (made, *operands)]
        return [f"compute     {formula(compute[0], compute[1:], layout.spatial_letters)}"]
    if isinstance(one, SumBias):
        stored, gathered = layout.out.dims, reading.compute_layout(layout.out).dims
        dims = gathered if one.gathered else stored
        summed = [dim.letter for dim in dims if dim.letter not in reading.bias.letters]
        sigma = f"Σ_{','.join(summed)} " if summed else ""
        again = " (as gathered above)" if dims != stored else ""
        return [f"compute     db = {sigma}{TensorSpec(f'd{layout.out.name}', dims)}{again}"]
    if isinstance(one, AddBias):
        reduced = set(reading.communicated_over(layout.out)) - set(layout.out.partial)
        return [f"add         {reading.bias}, once{_after(bool(reduced), layout.out.partial)}"]
    return []


def _left(phase: str, layout: Notation, reading: Reading) -> list[str]:
    """What a phase leaves unsummed to the caller."""
    left: dict[str, tuple[str, ...]] = {"forward": layout.out.partial, "db": reading.bias.grad_partial}
    left |= {f"d{spec.name}": spec.grad_partial for spec in (layout.lhs, layout.rhs)}
    name = layout.out.name if phase == "forward" else phase
    return [f"leave       {name} partial over {axis}: the caller sums it" for axis in left[phase]]


def _after(reduced: bool, left: Sequence[str]) -> str:
    if left:
        return f" (by the first rank of {', '.join(left)}, since the sum is left to the caller)"
    return ", after the reduction" if reduced else ""


def _communicated(layout: Notation, reading: Reading) -> list[str]:
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


def _move(name: str, move: Move) -> str:
    before, after = TensorSpec(name, move.before), TensorSpec(name, move.after)
    text = _VERB[move.kind].format(tensor=name, axis=move.axis)
    operation, _, rest = text.partition(" ")
    return f"{operation:<11} {rest}" + (f"   {before} -> {after}" if before.dims != after.dims else "")


def formula(made: TensorSpec, operands: Sequence[TensorSpec], spatial: Sequence[str] = ()) -> str:
    """A local product in letters, with the letters that it sums over (and those that windows move over)."""
    plain = TensorSpec(made.name, made.dims)
    known = (*made.letters, *spatial)
    letters = dict.fromkeys(letter for t in operands for letter in t.letters if letter not in known)
    sigma = f"Σ_{','.join(letters)} " if letters else ""
    times = " ∗ " if spatial else " "  # ∗: over windows
    return f"{plain} = {sigma}{times.join(str(TensorSpec(t.name, t.dims)) for t in operands)}"
