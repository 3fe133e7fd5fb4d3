"""The table of explanations: each knows what it would have done to a tensor, and what to do about it.

An explanation is a generator of guesses about one wrong tensor. A guess predicts every rank's tensor from the exact
one, or from what else is known of the step; `diagnose` holds it against what was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt

import torch
from torch import Tensor

from shardgrad.verification.counterfactual import looked_up, other_parameters, own_terms, some_uses
from shardgrad.verification.hypothesis import Context, Evidence, Hypothesis, list_of
from shardgrad.verification.observed import Split
from shardgrad.verification.otherwise import epsilon_moved, other_constants, other_functions, other_tables
from shardgrad.verification.over_steps import (
    drawn_at_random,
    from_the_first_step,
    kept_by_the_optimizer,
    made_by_the_optimizer,
    parameters_of_the_first_step,
)
from shardgrad.verification.precision import lower_precision, sums_of_lower_precision
from shardgrad.verification.rearranged import rearranged, transposed, wrong_slices
from shardgrad.verification.rounding import floor
from shardgrad.verification.rows import norm_of_rows, rows_weighted
from shardgrad.verification.terms import scaled, sum_missing

Explanation = Callable[[Evidence, Context], Iterator[Hypothesis]]


def missing(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """A rank has none, or one device has none."""
    none = [rank for rank, tensor in enumerate(seen.found.locals) if tensor is None]
    if none:
        says = f"rank{'s' if len(none) > 1 else ''} {list_of(none)} never computed it"
        yield Hypothesis(
            "never computed", says, "look for detach(), no_grad(), or a parameter that is not used there", (), ()
        )
    elif (seen.kind, seen.name) in known.exact and not seen.fits and seen.exact.dim():
        whole = [seen.exact] * len(seen.ranks)
        says = "every rank holds the whole tensor, where it should hold its part"
        yield Hypothesis(
            "not sharded", says, f"shard it: store it as {seen.split}", whole, [seen.scale] * len(seen.ranks)
        )


def not_finite(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    bad = [rank for rank in seen.ranks if not bool(seen.held[rank].isfinite().all())]
    if bad:
        yield Hypothesis(
            "not finite",
            f"rank{'s' if len(bad) > 1 else ''} {list_of(bad)} ha{'ve' if len(bad) > 1 else 's'} "
            f"{sum(int((~seen.held[r].isfinite()).sum()) for r in bad)} elements that are NaN or infinite",
            "look for what was read before it was written, divided by zero, or overflowed",
            (),
            (),
        )


def drifted(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Replicas that are not the same bits before the step."""
    if seen.kind == "value":
        off = [rank for rank in seen.ranks if not torch.equal(seen.held[rank], seen.right[rank])]
        says = f"rank{'s' if len(off) > 1 else ''} {list_of(off)} hold{'s' if len(off) == 1 else ''} other values than "
        remedy = "initialise replicas with one seed or broadcast them, and give every replica the same gradient"
        yield Hypothesis(
            "replicas have drifted apart", says + "the first rank that should hold the same", remedy, (), ()
        )


def nothing(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Zero, or as it was before the step."""
    zero = [torch.zeros_like(right) for right in seen.right]
    if seen.kind == "step":
        if seen.name in known.before:
            value, split = known.before[seen.name]
            at = [split.shard(value.double(), seen.mesh, c) for c in seen.found.coordinates]
            says = "it is what it was before the step"
            yield Hypothesis(
                "stale",
                says,
                "give the parameter to the optimizer, and step after its gradient is there",
                at,
                seen.size,
            )
    else:
        says = "it is zero: never written, or written elsewhere"
        remedy = {
            "gradient": "look for a gradient that is computed but not stored, or kept under another name or replica",
        }.get(seen.kind, "look for a buffer that was not filled, a result that was dropped, or a mask")
        yield Hypothesis("stale", says, remedy, zero, seen.size)


def padding_counted(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """What is wrong lies beyond the tensor of one device."""
    real = known.real.get((seen.kind, seen.name))
    if real is None or real == tuple(seen.exact.shape) or len(real) != seen.exact.dim():
        return
    inside = torch.zeros(seen.exact.shape, dtype=torch.bool)
    inside[tuple(slice(size) for size in real)] = True
    mine = seen.parts(inside)
    wanted = [torch.where(m, right, held) for m, right, held in zip(mine, seen.right, seen.held)]
    says = "it is right but for what belongs to the padding, which should be zero"
    yield Hypothesis(
        "padding counted",
        says,
        "mask the padded classes before the loss (or the rows, in the mean)",
        wanted,
        seen.size,
        cost=1,
    )


def factors(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """p times, or a p-th, of what it should be."""
    bias = seen.exact.dim() == 1 and "bias" in seen.name.rsplit(".", 1)[-1]
    for axes, p in seen.axes():
        over = list_of(axes)
        more, less = scaled(seen, p), scaled(seen, 1 / p)
        yield Hypothesis(
            f"summed twice over {over}", f"it is {p} times what it should be: complete tensors were added up",
            f"leave out one of the two reductions over {over}: the tensor was already complete on every rank "
            "(sg.all_reduce's backward is nothing, sg.gather_replicated's a slice)", *more, reduced=axes,
        )  # fmt: skip
        yield Hypothesis(
            f"sum over {over} where a mean belongs",
            f"it is {p} times what it should be",
            f"divide by {p}",
            *more,
            reduced=axes,
        )
        yield Hypothesis(
            f"mean over {over} where a sum belongs", f"it is 1/{p} of what it should be",
            f"do not divide by {p}: the ranks' tensors are terms of one sum, or are complete already", *less,
            reduced=axes,
        )  # fmt: skip
        if bias:
            says = f"it is {p} times what it should be: every rank of {over} adds the bias, or its gradient"
            remedy = f"add the bias once, after the reduction over {over}, and do not all-reduce its gradient"
            yield Hypothesis(f"bias counted by every rank of {over}", says, remedy, *more, reduced=axes)
            says = f"it is 1/{p} of what it should be: a bias divided by {p} in forward has that gradient"
            remedy = f"add the whole bias once after the reduction over {over}, instead of bias/{p} before it"
            yield Hypothesis(f"bias divided by the ranks of {over}", says, remedy, *less, reduced=axes)
    says = "it is what it should be, but for the sign"
    yield Hypothesis("sign flipped", says, "look for a minus, or an update that goes uphill", *scaled(seen, -1.0))


def constant(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Some other constant, of the whole tensor or of each rank."""
    if not seen.fits or seen.kind in ("loss", "norm") or seen.exact.numel() < 2:
        return
    pairs = list(zip(seen.held, seen.right))
    weight = [1 / size.square() for size in seen.size]
    over = [float((w * a * b).sum()) for w, (a, b) in zip(weight, pairs)]
    under = [float((w * b * b).sum()) for w, (a, b) in zip(weight, pairs)]
    wrong = [rank for rank in seen.ranks if bool(seen.wrong[rank].any()) and under[rank] > 0]
    if not wrong:
        return
    at_wrong = sum(over[r] for r in wrong) / sum(under[r] for r in wrong)
    remedy = "look for a scale, a learning rate, a count of tokens or a dtype's loss scale that one device has not"
    if at_wrong and at_wrong == at_wrong:
        yield Hypothesis("scaled by a constant", f"it is {_number(at_wrong, seen)} times what it should be", remedy,
                    *scaled(seen, at_wrong), cost=2, fitted=1)  # fmt: skip
    own = [over[r] / under[r] if r in wrong else 1.0 for r in seen.ranks]
    if len(wrong) > 1 and all(own):
        says = "rank by rank it is " + list_of([f"{c:.4g}" for c in own]) + " times what it should be"
        wanted = [c * right for c, right in zip(own, seen.right)]
        size = [abs(c) * one for c, one in zip(own, seen.size)]
        yield Hypothesis(
            "scaled on each rank by another constant", says, remedy, wanted, size, cost=3, fitted=len(wrong)
        )
    for dim in range(seen.exact.dim()):
        others = [d for d in range(seen.exact.dim()) if d != dim]
        if not others or seen.exact.shape[dim] < 2:
            continue
        rates = [
            (w * a * b).sum(others, keepdim=True) / (w * b * b).sum(others, keepdim=True).clamp(min=1e-300)
            for w, (a, b) in zip(weight, pairs)
        ]
        wanted = [rate * right for rate, right in zip(rates, seen.right)]
        size = [rate.abs() * one + one for rate, one in zip(rates, seen.size)]
        says = f"each index of dim {dim} has another factor"
        remedy = f"look for a weight, a mask or a normalisation along dim {dim} that is applied twice or not at all"
        yield Hypothesis(f"scaled along dim {dim}", says, remedy, wanted, size, cost=8, fitted=seen.exact.shape[dim])


def _number(c: float, seen: Evidence) -> str:
    for axis, p in seen.mesh.items():
        for power, name in ((0.5, f"√{axis}"), (-0.5, f"1/√{axis}"), (2, f"{axis}²"), (-2, f"1/{axis}²")):
            if p > 1 and abs(c / p**power - 1) < 1e-3:
                return f"{c:.6g} ({name}, with {axis}={p})"
    return f"{c:.6g}"


def summed_shards(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Shards, which are different parts, were added up or averaged as if they were terms or replicas."""
    for axes, p in seen.axes(sharded=True):
        if not seen.fits or any(len({seen.right[r].shape for r in group}) > 1 for group in seen.groups(axes)):
            continue
        total = seen.summed(seen.right, axes)
        size = [square.sqrt() for square in seen.summed([size.square() for size in seen.size], axes)]
        over = list_of(axes)
        remedy = f"take it out of what is reduced over {over}: {seen.split} is sharded there"
        says = f"the shards of the ranks of {over}, which are different parts of it, were added up"
        yield Hypothesis(f"shards summed over {over}", says, remedy, total, size)
        says = f"the shards of the ranks of {over}, which are different parts of it, were averaged"
        yield Hypothesis(f"shards averaged over {over}", says, remedy, [t / p for t in total], [s / p for s in size])


def other_tensor(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """It is what another tensor of the step should be."""
    for (kind, name), (exact, split) in known.exact.items():
        if (kind, name) == (seen.kind, seen.name) or kind in ("norm", "loss") or exact.dim() != seen.exact.dim():
            continue
        wanted = [split.shard(exact, seen.mesh, at) for at in seen.found.coordinates]
        if any(a.shape != b.shape for a, b in zip(wanted, seen.right)):
            continue
        size = [
            floor(one, seen.dtype, len(seen.ranks)) + one.square().mean().sqrt() * torch.finfo(seen.dtype).eps
            for one in wanted
        ]
        size = [torch.maximum(a, b) for a, b in zip(size, seen.size)]
        what = f"the {kind} of {name}" if kind != seen.kind else name
        remedy = f"two tensors were exchanged, or one is used for both: look where {seen.name} and {name} are named"
        yield Hypothesis(
            "another tensor", f"it is what {what} should be", remedy, wanted, size, cost=1 + (kind != seen.kind)
        )


def update(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """After the optimizer: the step is p times, a p-th, uphill, or another constant times what it should be."""
    if seen.kind != "step" or seen.name not in known.before or not seen.fits:
        return
    value, split = known.before[seen.name]
    before = [split.shard(value.double(), seen.mesh, at) for at in seen.found.coordinates]
    step = [right - at for right, at in zip(seen.right, before)]
    taken = [held - at for held, at in zip(seen.held, before)]
    if before and any(bool(at.any()) for at in before):
        more = sum(float(((held - right) * at).sum()) for held, right, at in zip(seen.held, seen.right, before))
        decay = more / sum(float(at.square().sum()) for at in before)
        wanted = [right + decay * at for right, at in zip(seen.right, before)]
        says = f"besides the right step it is {'decayed' if decay < 0 else 'grown'} by {abs(decay):.4g} times its value"
        remedy = "look at the weight decay: other groups of parameters, applied twice, scaled by another learning rate"
        yield Hypothesis("decayed by another factor", says, remedy, wanted, seen.size, cost=2, fitted=1)
    named: list[tuple[float, str, tuple[str, ...]]] = []
    for axes, p in seen.axes():
        named.append((p, f"summed twice over {list_of(axes)}", axes))
        named.append((1 / p, f"mean over {list_of(axes)} where a sum belongs", axes))
    wrong = [rank for rank in seen.ranks if bool(seen.wrong[rank].any())]
    over = [float((a * b).sum()) for a, b in zip(taken, step)]
    under = [float(s.square().sum()) for s in step]
    wrong = [rank for rank in wrong if under[rank] > 0]
    fitted = sum(over[r] for r in wrong) / sum(under[r] for r in wrong) if wrong else 0.0
    own = [over[r] / under[r] if r in wrong else 1.0 for r in seen.ranks]
    if len(wrong) > 1 and len(wrong) == len(seen.ranks):
        says = "rank by rank the step is " + list_of([f"{c:.4g}" for c in own]) + " times what it should be"
        remedy = "give every rank the same learning rate, and the same factor of clipping"
        wanted = [at + c * s for at, c, s in zip(before, own, step)]
        size = [(1 + abs(c)) * one for c, one in zip(own, seen.size)]
        yield Hypothesis(
            "scaled on each rank by another constant", says, remedy, wanted, size, cost=3, fitted=len(wrong)
        )
    for c, name, reduced, cost in [
        *((*one, 0) for one in named),
        (-1.0, "sign flipped", (), 0),
        (fitted, "scaled by a constant", (), 2),
    ]:
        if c:
            wanted = [at + c * s for at, s in zip(before, step)]
            says = f"the step is {c:.4g} times what it should be"
            remedy = "look at what happens between backward and the optimizer: clipping, averaging, the learning rate"
            yield Hypothesis(
                name,
                says,
                remedy,
                wanted,
                [(1 + abs(c)) * size for size in seen.size],
                cost=cost,
                fitted=cost // 2,
                reduced=reduced,
            )


def norm(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """The norm of all gradients: which of them were counted how often."""
    if seen.kind != "norm":
        return
    gradients = {name: (exact, split) for (kind, name), (exact, split) in known.exact.items() if kind == "gradient"}

    for axes, p in seen.axes():
        over = list_of(axes)

        def sharded_over(sharding: tuple[str, ...], axes: tuple[str, ...] = axes) -> bool:
            return any(axis in sharding for axis in axes)

        def whole(exact: Tensor) -> float:
            return float(exact.square().sum())

        once = {name: whole(exact) for name, (exact, _) in gradients.items()}
        shared = sum(once[n] for n, (_, split) in gradients.items() if not sharded_over(_axes_of(split)))
        total = sum(once.values())
        local = [
            sum(
                whole(split.shard(exact, seen.mesh, seen.found.coordinates[rank]))
                for exact, split in gradients.values()
                if sharded_over(_axes_of(split))
            )
            for rank in seen.ranks
        ]
        remedy = (
            f"sum squares over {over} of sharded gradients alone; count each replicated gradient once "
            "(sg.clip_grad_norm_)"
        )
        every = len(seen.ranks)
        counted = f"replicated gradients were counted {p} times, once by every rank of {over}"
        possible: tuple[tuple[str, str, list[float]], ...] = (
            ("replicated gradients counted by every rank", counted, [total + (p - 1) * shared] * every),
            (f"sum over {over} missing", "every rank has the norm of its own part", [shared + c for c in local]),
            ("replicated gradients left out", f"those replicated over {over} were left out", [total - shared] * every),
            ("sharded gradients left out", f"gradients sharded over {over} were left out", [shared] * every),
        )
        for name, says, squares in possible:
            wanted = [torch.tensor(sqrt(max(square, 0.0)), dtype=torch.float64) for square in squares]
            yield Hypothesis(name, says, remedy, wanted, seen.size)


def _axes_of(split: Split) -> tuple[str, ...]:
    return tuple(axis for dim in split.spec.dims for axis in dim.axes)


EXPLANATIONS: tuple[Explanation, ...] = (
    missing,
    not_finite,
    drifted,
    nothing,
    padding_counted,
    sum_missing,
    factors,
    norm,
    update,
    wrong_slices,
    rearranged,
    transposed,
    summed_shards,
    other_tensor,
    constant,
    lower_precision,
    sums_of_lower_precision,
    from_the_first_step,
    drawn_at_random,
    kept_by_the_optimizer,
    made_by_the_optimizer,
    looked_up,
)
"""Those that ask for no further step of one device."""

RERUNS: tuple[Explanation, ...] = (
    parameters_of_the_first_step,
    own_terms,
    some_uses,
    rows_weighted,
    norm_of_rows,
    other_functions,
    epsilon_moved,
    other_constants,
    other_tables,
    other_parameters,
)
"""Those that do, in the order in which they are tried."""


def groups(reruns: bool) -> Iterator[tuple[Explanation, ...]]:
    """What is tried together. The later ones only if none of the earlier ones fits well."""
    yield EXPLANATIONS
    if reruns:
        yield from ((one,) for one in RERUNS)
