"""Why a tensor is wrong: explanations are tried until one reproduces what every rank has.

An explanation fits if what it predicts differs from what was seen by no more than verification itself allows
(`rounding.Bounds`), and by an eighth at most of what the right tensor differs. The simplest that fits is reported: for
the whole tensor before for some ranks, that before for some elements; without a constant fitted to it before with one.
What is as simple and fits as well is reported too. A fit that could be chance is none: an explanation of some elements,
or with numbers fitted to it, must save 20 bits for each, n log₂(error before / error left) for n elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, log2

import torch
from torch import Tensor

from shardgrad.verification.explanations import RERUNS, groups
from shardgrad.verification.hypothesis import Context, Evidence, Hypothesis, list_of
from shardgrad.verification.observed import Kind, Observed
from shardgrad.verification.terms import same_on

MOST = 8
"""Tensors to look at, from the first that is wrong, until one is explained."""
_BITS = 20.0
_BETTER = 8.0
_AS_GOOD = 4.0
_LEVELS = (0, 1, 3)


@dataclass(frozen=True)
class Fit:
    """An explanation that reproduces the tensor.

    name: of the explanation. says: what happened. remedy: what to do.
    where: "" if it holds for the whole tensor, else for which ranks or elements.
    error: what is left of the worst element, in units of rounding; allowed: how much may be left.
    """

    name: str
    says: str
    remedy: str
    where: str
    error: float
    allowed: float


@dataclass(frozen=True)
class Diagnosis:
    """Why one tensor is wrong. `fits` is empty if no explanation fits; several fit equally well.

    error: of the worst element, in units of rounding, as it was seen.
    off: where it is wrong and by how much, for the reader.
    later: whether an earlier tensor is wrong too, of which this may be a consequence.
    """

    kind: Kind
    name: str
    error: float
    fits: tuple[Fit, ...]
    off: str = ""
    later: bool = False

    def __str__(self) -> str:
        if not self.fits:
            return f"the {self.kind} of {self.name}: no explanation fits" + (f"; {self.off}" if self.off else "")
        lines = []
        for at, fit in enumerate(self.fits):
            left = f"reproduces it to {fit.error:.2g} times rounding, where {fit.allowed:.0f} are allowed"
            left = left if fit.allowed else "is what was seen"
            where = f" ({fit.where})" if fit.where else ""
            start = (
                f"{'later: ' if self.later else ''}the {self.kind} of {self.name}"
                if at == 0
                else "or, which fits as well"
            )
            lines.append(f"{start}: {fit.name}{where}. {_sentence(fit.says)}; this {left}. {_sentence(fit.remedy)}.")
        return "\n".join(lines)


def diagnose(found: Sequence[Observed], known: Context) -> tuple[Diagnosis, ...]:
    """Of wrong tensors in the order of execution: the first, and, where that has no explanation, the next that has one.

    Later ones are wrong in consequence, mostly; of them only what needs no further step of one device is tried, unless
    all before were single numbers, of which little can be told.
    """
    after = ("norm", "step", "second step")  # where a gradient is wrong, these are wrong in consequence alone
    looked_at = [one for one in found if one.kind not in after or found[0].kind in after][:MOST]
    if not looked_at:
        return ()
    known = replace(known, wrong=frozenset((one.kind, one.name) for one in found))
    first = explain(looked_at[0], known)
    if first.fits:
        return (first,)
    told = looked_at[0].exact.numel() > 1
    for one in looked_at[1:]:
        later = explain(one, known, reruns=not told)
        told |= one.exact.numel() > 1
        if later.fits:
            return first, replace(later, later=True)
    return (first,)


def explain(found: Observed, known: Context, *, reruns: bool = True) -> Diagnosis:
    """Try the explanations of the table on one tensor; and, where none fits and ranks that should have the same have
    not, on the sum of what they have, as it may be made later.

    Args:
        reruns: whether those too that let one device run again, one after the other, until one fits.
    """
    own = _explain(found, known, reruns)
    if own.fits or found.kind not in ("output", "output gradient", "input gradient", "loss"):
        return own
    seen = Evidence(found, known.real.get((found.kind, found.name)))
    for axes, _ in seen.axes(sharded=False) if seen.fits and not found.split.partial else ():
        if not same_on(axes, seen):
            summed = _explain(replace(found, split=found.split.summed_over(axes)), known, reruns)
            if summed.fits:
                where = f"the sum over {list_of(axes)} of what the ranks have"
                told = [replace(fit, where=f"{where}, {fit.where}" if fit.where else where) for fit in summed.fits]
                return replace(own, fits=tuple(told), off="")
    return own


def _explain(found: Observed, known: Context, reruns: bool) -> Diagnosis:
    seen = Evidence(found, known.real.get((found.kind, found.name)))
    before = _worst(seen.held, seen.right, seen.size, None) if seen.fits else inf
    tried: list[_Tried] = []
    for explanations in groups(reruns):
        for guess in (guess for one in explanations for guess in one(seen, known)):
            level, fit = _fit(guess, seen)
            if fit is not None:
                tried.append((guess.cost + _LEVELS[level], *fit))
        if any(cost == 0 or (cost <= 2 and left <= 1.0 and explanations[0] in RERUNS) for cost, _, left in tried):
            break  # what comes is less simple
    fits: list[Fit] = []
    if tried:
        least = min(left for _, _, left in tried)
        good = [(cost, fit) for cost, fit, left in tried if left <= max(_AS_GOOD * least, 1.0)]
        simplest = min(cost for cost, _ in good)
        fits = [fit for cost, fit in good if cost == simplest]
    unique = {fit.name: fit for fit in reversed(fits)}
    return Diagnosis(found.kind, found.name, before, tuple(reversed(unique.values())), "" if unique else _off(seen))


_Tried = tuple[int, Fit, float]
"""An explanation's cost, what it says, and the error it leaves."""


def _fit(guess: Hypothesis, seen: Evidence) -> tuple[int, tuple[Fit, float] | None]:
    """How widely a guess fits (0: everywhere, 1: on the wrong ranks, 2: at the wrong elements), and what it leaves:
    of its worst element, and the root mean square over all, in units of rounding."""
    if guess.size == ():  # nothing to compare: it is so
        return 0, (Fit(guess.name, guess.says, guess.remedy, "", 0.0, 0.0), 0.0)
    got = seen.held if guess.got is None else guess.got
    if any(a.shape != b.shape for a, b in zip(got, guess.wanted)):
        return 0, None
    if guess.got is None and not seen.may_be(guess.wanted, guess.size):
        return 0, None
    everywhere = [torch.ones_like(one, dtype=torch.bool) for one in got]
    levels = [everywhere]
    if guess.got is None and seen.fits and any(bool(wrong.any()) for wrong in seen.wrong):
        ranks = [one | bool(wrong.any()) for one, wrong in zip([torch.zeros_like(w) for w in everywhere], seen.wrong)]
        levels += [ranks, seen.wrong]
    for level, where in enumerate(levels):
        if level and guess.reduced and not _on_whole_groups(guess.reduced, seen):
            break
        error = _worst(got, guess.wanted, guess.size, where)
        if error > seen.allowed:
            continue
        left = _mean(got, guess.wanted, guess.size, where)
        before = _mean(seen.held, seen.right, seen.size, where) if seen.fits and guess.got is None else inf
        if before < _BETTER * left:
            continue
        count = min(sum(int(w.sum()) for w in where), max(seen.exact.numel(), 1))  # replicas are no further evidence
        bits = count * log2(min(before / max(left, 1.0), 1e30)) if before > 1 else 0.0
        if bits < _BITS * max(guess.fitted, int(level == 2)):
            continue
        return level, (Fit(guess.name, guess.says, guess.remedy, _where(level, seen), error, seen.allowed), left)
    return 0, None


def _on_whole_groups(axes: Sequence[str], seen: Evidence) -> bool:
    """Whether, of the ranks along these axes, all are wrong or none."""
    wrong = [bool(one.any()) for one in seen.wrong]
    return all(len({wrong[rank] for rank in group}) == 1 for group in seen.groups(axes))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _where(level: int, seen: Evidence) -> str:
    if level == 0:
        return ""
    ranks = [rank for rank in seen.ranks if bool(seen.wrong[rank].any())]
    on = f"on rank{'s' if len(ranks) > 1 else ''} {list_of(ranks)} alone" if len(ranks) < len(seen.ranks) else ""
    if level == 1:
        return on
    parts, whole = [], seen.right[ranks[0]].shape
    for dim, size in enumerate(whole):
        others = [d for d in range(len(whole)) if d != dim]
        hit = seen.wrong[ranks[0]].sum(others).nonzero().view(-1).tolist() if others else None
        hit = seen.wrong[ranks[0]].nonzero().view(-1).tolist() if hit is None else hit
        if len(hit) < size:
            span = f"{hit[0]}" if len(hit) == 1 else f"{hit[0]}…{hit[-1]}"
            parts.append(f"indices {span} of dim {dim}")
    count = sum(int(wrong.sum()) for wrong in seen.wrong)
    inside = " and ".join(parts) + f" of rank {ranks[0]}'s part" if parts else f"{count} elements"
    return f"{inside} alone" + (f", {on}" if on else "")


def _off(seen: Evidence) -> str:
    """How far it is from the exact tensor, and where, for want of an explanation."""
    if not seen.fits or not any(bool(wrong.any()) for wrong in seen.wrong):
        return ""
    far = sum(float((a - b).square().sum()) for a, b in zip(seen.held, seen.right)) ** 0.5
    whole = sum(float(b.square().sum()) for b in seen.right) ** 0.5
    share = f"off by {far / whole:.2g} of its norm" if whole else "off, where it should be zero"
    return share + f", in {_where(2, seen)}".replace(" alone", "")


def _worst(
    got: Sequence[Tensor], wanted: Sequence[Tensor], size: Sequence[Tensor], where: Sequence[Tensor] | None
) -> float:
    worst = 0.0
    for at, (a, b, s) in enumerate(zip(got, wanted, size)):
        far = torch.where(a == b, torch.zeros_like(s), (a - b).abs() / s).nan_to_num(inf, inf)
        far = far if where is None else far[where[at]]
        worst = max(worst, float(far.max()) if far.numel() else 0.0)
    return worst


def _mean(got: Sequence[Tensor], wanted: Sequence[Tensor], size: Sequence[Tensor], where: Sequence[Tensor]) -> float:
    """The root mean square error over that of rounding."""
    error = sum(float((a - b)[w].square().sum()) for a, b, w in zip(got, wanted, where))
    rounding = sum(float(s[w].square().sum()) for s, w in zip(size, where))
    return (error / rounding) ** 0.5 if rounding > 0 else inf
