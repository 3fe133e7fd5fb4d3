"""What two steps say of a tensor together: rounding, a mistake, or what cannot be told.

The second step has other values. Where it ran in float64, it decides: what is right there is right, unless the
program does not do the same thing twice; what is wrong there is wrong, though the working precision may hide it. Where
it could not, it ran in the working precision, as did a third one, and what decides is whether the same elements are
wrong: a point on a jump (ReLU at zero, a choice among equals) lies elsewhere in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from shardgrad.comm.mesh import MeshView
from shardgrad.verification import exchange
from shardgrad.verification.compare import Measured
from shardgrad.verification.record import Key
from shardgrad.verification.report import Row, Verdict

_SAME = 0.5
"""Share of the elements wrong in one step that must be wrong in another one, for the tensor to be."""


@dataclass(frozen=True)
class Judged:
    """A tensor with its row, and what was measured where the row is from."""

    row: Row
    measured: Measured

    def called(self, verdict: Verdict) -> Judged:
        return Judged(replace(self.row, verdict=verdict), self.measured)


Found = dict[Key, Judged]


Again = Callable[[Sequence[Key]], set[Key]]
"""Which of these tensors of the first step are other bits, on any rank, when it is done again. On every rank."""


def by_float64(first: Found, second: Found, again: Again) -> Found:
    """The verdicts of a step in the working precision and one in float64."""
    suspects = [key for key, one in first.items() if not one.row.ok and key in second and second[key].row.ok]
    changing = again(suspects) if suspects else set()
    found: Found = {}
    for key in dict.fromkeys((*first, *second)):
        one, other = first.get(key), second.get(key)
        if one is None or (other is not None and not other.row.ok and one.row.ok):
            assert other is not None
            order = other.row.order if one is None else one.row.order
            found[key] = Judged(replace(other.row, in_float64=True, order=order), other.measured)
        elif other is None or one.row.ok:
            judged = one.row.verdict == "not judged" and other is not None and other.row.verdict == "rounding"
            found[key] = other if judged else one  # type: ignore[assignment]
        elif not other.row.ok:
            found[key] = Judged(one.row, other.measured)  # float64's evidence is sharper
        else:
            found[key] = one.called("not the same twice" if key in changing else "cannot tell")
    return found


def by_three(steps: Sequence[Found], again: Again, mesh: MeshView) -> Found:
    """The verdicts of steps in the working precision, each with other values."""
    first = steps[0]
    wrong = {key: [step[key] for step in steps if key in step and not step[key].row.ok] for key in first}
    once = [key for key, found in wrong.items() if len(found) == 1]
    changing = again(once) if once else set()
    often = [key for key, found in wrong.items() if len(found) > 1]
    same = dict(zip(often, _same_elements([wrong[key] for key in often], mesh)))
    found: Found = {}
    for key, one in first.items():
        if not wrong[key]:
            found[key] = one
        elif key in same:
            worst = wrong[key][0]
            judged = Judged(replace(worst.row, order=one.row.order), worst.measured)
            found[key] = judged if same[key] else judged.called("cannot tell")
        else:
            found[key] = wrong[key][0].called("not the same twice" if key in changing else "cannot tell")
    return found


def _same_elements(found: Sequence[Sequence[Judged]], mesh: MeshView) -> list[bool]:
    """Of tensors that are wrong in several steps, whether the same elements are, in two of them at least."""
    counts = []
    for judged in found:
        masks = [one.measured.wrong for one in judged]
        for a, b in combinations(masks, 2):
            if a is None or b is None or a.shape != b.shape:
                counts.append(torch.zeros(2, dtype=torch.float64))
            else:
                few = min(int(a.sum()), int(b.sum()))
                counts.append(torch.tensor([float((a & b).sum()), float(few)], dtype=torch.float64))
    sums, at, same = exchange.sums_of_all(counts, mesh), 0, []
    for judged in found:
        pairs = len(list(combinations(judged, 2)))
        here = sums[at : at + pairs]
        same.append(any(both >= _SAME * few for both, few in (pair.tolist() for pair in here)))
        at += pairs
    return same
