"""The steps that a verification consists of: one as it is, and one with other values, in float64 if it can be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from shardgrad.comm.mesh import MeshView
from shardgrad.verification import exchange, together
from shardgrad.verification.attempt import Attempt, Step
from shardgrad.verification.bits import raw
from shardgrad.verification.compare import VERDICTS, Measured, rows_of
from shardgrad.verification.context import context_of
from shardgrad.verification.decide import Found, Judged, by_float64, by_three
from shardgrad.verification.exact import why_not
from shardgrad.verification.hypothesis import Context
from shardgrad.verification.pairing import Pair, local_part
from shardgrad.verification.record import Key
from shardgrad.verification.report import Verdict
from shardgrad.verification.rounding import FEW, RUNS, Spread

_WHAT = "verification"


class Steps:
    """Runs them, and says of every tensor what they say together. Used once, on every rank alike.

    notes: for the report. runs: of one device, that the yardstick of the first step was made of.
    """

    def __init__(self, attempt: Attempt, seed: int, tell: Callable[[str], None]) -> None:
        self._attempt, self._seed, self._tell = attempt, seed, tell
        self._mesh = attempt.mesh
        self.notes: tuple[str, ...] = ()
        self.runs = 0
        self._evidence: tuple[Step, Found]
        self._first: Step

    def judged(self) -> Found:
        """Every tensor with its verdict. Leaves the parallel model's parameters and gradients changed.

        Raises:
            ValueError, ShapeError, LayoutError: as `sg.verify`.
        """
        first, spreads, found = self._in_working_precision(self._seed, "the step", nudge=False)
        self.runs = max((len(spread.norms) for spread in spreads.values()), default=0)
        self._evidence, self._first = (first, found), first

        def again(keys: Sequence[Key]) -> set[Key]:
            return self._not_the_same_twice(first, keys)

        second, why = self._in_float64()
        if second is not None:
            measured = self._attempt.measure(second, self._attempt.in_single(second, spreads))
            in_float64 = judge(measured, self._mesh)
            if any(not one.row.ok for one in in_float64.values()):
                self._evidence = second, in_float64
            return by_float64(found, in_float64, again)
        if why:
            self.notes = (
                f"the second step was not in float64, as {why}: what is wrong at one point alone is not told",
            )
        steps = [found, self._in_working_precision(self._seed + 1, "another step", nudge=True)[2]]
        if any(not one.row.ok for step in steps for one in step.values()):
            steps.append(self._in_working_precision(self._seed + 2, "a third step", nudge=True)[2])
        return by_three(steps, again, self._mesh)

    def known(self, wrong: Collection[Key]) -> Context:
        """What explanations of these tensors may use."""
        step, found = self._evidence
        measured = [one.measured for one in found.values()]
        return context_of(self._attempt, step, self._first, measured, wrong)

    @property
    def ends(self) -> set[str]:
        """Outputs that are what parallel returns, or what is differentiated."""
        return self._evidence[0].parallel.ends

    @property
    def changed_buffers(self) -> set[str]:
        """Buffers that a step of single changes, as parallel calls them."""
        return {self._attempt.placer.name_in_parallel(name) for name in self._attempt.state}

    def _in_working_precision(self, seed: int, what: str, *, nudge: bool) -> tuple[Step, Mapping[Key, Spread], Found]:
        """A step, and one device's errors: over few runs, or many if something differs by more than few allow."""
        self._tell(f"{what} of both models")
        step = self._attempt.step(seed, nudge=nudge, double=False)
        ranks = len(exchange.coordinates(self._mesh))
        spreads: dict[Key, Spread] = {}
        found: Found = {}
        for runs in (min(-(-FEW // ranks) * ranks, RUNS), RUNS):
            self._tell(f"{what}: {runs} runs of one device")
            spreads = self._attempt.spreads(step, spreads, runs)
            found = judge(self._attempt.measure(step, spreads), self._mesh)
            if all(one.row.ok for one in found.values()):
                break
        return step, spreads, found

    def _in_float64(self) -> tuple[Step | None, str]:
        """The second step, or why there is none in float64. The same answer on every rank."""
        if all(value.dtype == torch.float64 for value in self._attempt.values):
            return None, ""  # it is in float64, which bounds of its own judge
        self._tell("another step of both models, in float64")
        step, why = None, why_not(self._attempt.parallel.model)
        if not why:
            try:
                step = self._attempt.step(self._seed + 1, nudge=True, double=True)
                narrow = [
                    name
                    for (kind, name), tensor in step.parallel.tensors.items()
                    if kind == "gradient" and tensor.dtype != torch.float64
                ]
                if narrow:
                    why = f"the gradient of {narrow[0]} comes back in another precision"
            except Exception as error:
                why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
        reasons = together.spread([why] if why else [], self._mesh, _WHAT)
        return (None, reasons[0]) if reasons else (step, "")

    def _not_the_same_twice(self, step: Step, keys: Sequence[Key]) -> set[Key]:
        """The step twice more, as what is left out every other time may be there in one of them."""
        if self._mesh.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
            return set()  # sums there need not have the same order twice
        self._tell("the same step, twice more")
        differs = [False] * len(keys)
        for _ in range(2):
            other = self._attempt.repeated(step)
            for at, key in enumerate(keys):
                differs[at] |= not _same_bits(step.parallel.tensors.get(key), other.tensors.get(key))
        rows = exchange.ints_of_all([int(one) for one in differs], self._mesh)
        return {key for key, held in zip(keys, zip(*rows)) if any(held)}


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    a, b = local_part(a), local_part(b)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(raw(a), raw(b))


def judge(measured: Sequence[Measured], mesh: MeshView) -> Found:
    """Each tensor with its row, the same on every rank."""
    return {one.key: Judged(row, one) for one, row in zip(measured, rows_of(measured, mesh))}


def by_requires_grad(found: Found, pairs: Sequence[Pair], single: nn.Module, mesh: MeshView) -> Found:
    """With parameters that take a gradient on one side alone called so."""
    theirs = {name: parameter.requires_grad for name, parameter in single.named_parameters()}
    rows = exchange.ints_of_all([int(one.parameter.requires_grad) for one in pairs], mesh)
    for at, one in enumerate(pairs):
        wanted = theirs[one.single_name]
        other = [rank for rank, flags in enumerate(rows) if bool(flags[at]) != wanted]
        if not other:
            continue
        key: Key = ("gradient", one.name)
        verdict: Verdict = "frozen" if wanted else "trainable"
        inf, order = float("inf"), -1  # it was so before anything ran
        numbers = (VERDICTS.index(verdict), inf, 0.0, inf, 1.0, inf, 1.0, 0.0, order)
        split = one.split.summed_over(one.unsummed)
        measured = Measured(key, split, one.shape, None, None, None, numbers)
        (row,) = rows_of([measured], mesh)
        row = replace(row, rank=other[0])
        found[key] = Judged(row, found[key].measured if key in found else measured)
    return found
