"""Explanations by what is kept from one step to the next, or drawn at random."""

from __future__ import annotations

from collections.abc import Iterator

from shardgrad.verification.counterfactual import parameters_of
from shardgrad.verification.hypothesis import Context, Evidence, Hypothesis

_LAST = 12
"""Cost of what is true of a wrong tensor without reproducing it: whatever does comes before."""


def from_the_first_step(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """In the second step, what it was in the first, or that added."""
    first = known.earlier.get((seen.kind, seen.name))
    if first is None or not seen.fits or seen.split.partial or seen.kind == "buffer":  # which is put back
        return
    before = [one.to(right) for one, right in zip(first, seen.right) if one is not None and one.shape == right.shape]
    if len(before) < len(seen.right):
        return
    says = "in the second step it is what it was in the first one"
    remedy = "look for a value that is computed once and kept: a cache, a buffer, an early return"
    yield Hypothesis("kept from the step before", says, remedy, before, seen.size, cost=1)
    says = "in the second step that of the first one is in it too"
    remedy = "set it to zero, or to None, before each step; look for += where = belongs"
    both = [right + more for right, more in zip(seen.right, before)]
    yield Hypothesis("added to that of the step before", says, remedy, both, seen.size, cost=1)


def parameters_of_the_first_step(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """In the second step, what comes out with the first one's value of a parameter."""
    for name, value, _ in parameters_of(seen, known) if known.values_before else ():
        full = known.again((seen.kind, seen.name), {name: known.values_before[name].to(value)}, False)
        if full is None:
            return
        parts = seen.parts(full)
        says = f"in the second step it is what comes out with the value that {name} had in the first one"
        remedy = f"look for a copy of {name} that is made once and kept (gathered, cast, transposed)"
        yield Hypothesis("parameter kept from the step before", says, remedy, parts, seen.size, cost=1)


def drawn_at_random(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    if known.draws and seen.kind in ("output", "loss"):
        says = "the parallel model draws random numbers, which one device does not"
        remedy = (
            "turn off what draws them (F.dropout with training=True, noise), or let none be drawn for this comparison"
        )
        yield Hypothesis("drawn at random", says, remedy, (), (), cost=_LAST)


def kept_by_the_optimizer(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    if seen.kind == "second step" and ("step", seen.name) not in known.wrong:
        says = "the optimizer's first step is right, and its second is not: what it keeps between them is another"
        remedy = "compare momentum, dampening and betas, and look for state that is dropped, sharded or averaged"
        yield Hypothesis("state of the optimizer", says, remedy, (), (), cost=_LAST)


def made_by_the_optimizer(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    if seen.kind == "step" and not {("gradient", seen.name), ("norm", "all gradients")} & known.wrong:
        says = "the gradient is right, and the value after the step is not"
        remedy = (
            "compare the optimizer's class, learning rate, epsilon, decay and groups of parameters, and look for what "
            "else changes values"
        )
        yield Hypothesis("another update", says, remedy, (), (), cost=_LAST)
