"""Whether a tensor is a term of a sum, or of a mean, on each rank: not wrong, if what follows has been made of it.

A term of a mean is what data parallelism has that averages gradients: each rank differentiates the mean of its rows,
so that its loss is a term of a mean, and the gradients of its activations are p times those of the whole loss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from shardgrad.verification.diagnose import explain
from shardgrad.verification.hypothesis import Context, Evidence
from shardgrad.verification.observed import Kind, Observed
from shardgrad.verification.record import Key
from shardgrad.verification.report import Row, Verdict
from shardgrad.verification.terms import terms_of_a_sum

_FORWARD: tuple[Kind, ...] = ("output", "loss", "buffer")
_BETWEEN: tuple[Kind, ...] = ("output", "output gradient")
_MAY_BE: tuple[Kind, ...] = ("output", "output gradient", "input gradient", "loss")


def _right(seen: Evidence, made: Sequence[Tensor], sizes: Sequence[Tensor]) -> bool:
    return all(
        bool(((one - right).abs() <= seen.allowed * size).all()) for one, right, size in zip(made, seen.right, sizes)
    )


def term_of(found: Observed) -> Verdict | None:
    """What the ranks' tensors are terms of, if their sum, or mean, over some axes is right; or if they are the ranks'
    number times what they should be, as gradients are of each rank's own mean."""
    if any(tensor is None for tensor in found.locals):
        return None
    seen = Evidence(found)
    if not seen.fits:
        return None
    if terms_of_a_sum(found):
        return "term of a sum"
    for axes, ranks in seen.axes(sharded=False) if found.kind in _FORWARD else ():
        sums, sizes = seen.summed(seen.held, axes), seen.summed(seen.size, axes)
        if _right(seen, [one / ranks for one in sums], sizes):
            return "term of a mean"
    for _, ranks in seen.axes() if found.kind not in _FORWARD else ():
        if _right(seen, [one / ranks for one in seen.held], seen.size):
            return "term of a mean"
    return None


_ORDERS = (
    "interleaved", "rows in another order", "blocks interchanged", "gathered in the wrong order", "shards permuted",
    "reversed", "transposed",
)  # fmt: skip
_FACTORS = ("scaled by a constant", "summed twice", "sum over", "mean over")


def _is_elsewhere(found: Observed) -> bool:
    """Whether a tensor is the right one in another order; a gradient, or times a factor (a scale of the loss)."""
    names = [fit.name for fit in explain(found, Context(), reruns=False).fits if not fit.where]
    factor = found.kind in ("input gradient", "output gradient") and any(name.startswith(_FACTORS) for name in names)
    return factor or any(name in _ORDERS for name in names)


def by_design(
    rows: Mapping[Key, Row], findings: Mapping[Key, Observed], results: Collection[str], *, loss_left_out: bool = False
) -> dict[Key, Verdict]:
    """Of the wrong outputs, losses and gradients of outputs, those that are right by the program's design.

    Terms of a sum or a mean: everything that is computed after them, in forward or in backward, is right, or such a
    term as well. Terms of means also if all of these are: then the gradients of parameters are judged by themselves.
    Stored otherwise: all that a step leaves is right (what the model returns, the loss, every gradient of an input or a
    parameter, the norm, the step), so that what is between them has other values without being wrong. If a loss is made
    of it, what the model returns may have its rows in another order, as the inputs may that a rank is given.

    Args:
        results: outputs that the model returns, or that are differentiated.
        loss_left_out: whether the user asked not to compare the loss.
    """
    may_be = {key: term_of(one) for key, one in findings.items() if key[0] in _MAY_BE and rows[key].verdict == "bug"}
    found: dict[Key, Verdict] = {}
    for key in sorted((key for key, verdict in may_be.items() if verdict), key=lambda key: -rows[key].order):
        forward = key[0] in _FORWARD and key[0] != "loss"
        later = [other for other, row in rows.items() if row.order > rows[key].order]
        later = [other for other in later if not forward or other[0] in _FORWARD]
        verdict = may_be[key]
        if verdict and later and all(rows[other].ok or other in found for other in later):
            found[key] = verdict
    means = {key for key, verdict in may_be.items() if verdict == "term of a mean"}
    if any(kind == "loss" for kind, _ in means):
        if all(key in means or key in found for key in findings if key[0] in _MAY_BE):
            found |= dict.fromkeys(means, "term of a mean")
    elif not loss_left_out:  # then p times a gradient is p times too much
        found = {key: verdict for key, verdict in found.items() if verdict != "term of a mean"}
    between = [
        key for key, row in rows.items()
        if row.verdict in ("bug", "wrong shape") and key not in found and key[0] in _BETWEEN
    ]  # fmt: skip
    ends = [key for key in rows if key[0] not in _BETWEEN or key[1] in results]
    wrong = [key for key in ends if not rows[key].ok and key not in found]
    has_loss = loss_left_out or any(kind == "loss" for kind, _ in rows)
    terms: dict[Key, Verdict] = {
        key: verdict for key in wrong if key[0] == "loss" and (verdict := may_be.get(key)) == "term of a sum"
    }
    elsewhere = [key for key in wrong if key[0] == "input gradient" or (has_loss and key[0] in _BETWEEN)]
    if (
        any(key[0] == "gradient" for key in ends)
        and len(elsewhere) + len(terms) == len(wrong)
        and all(_is_elsewhere(findings[key]) for key in elsewhere)
    ):
        found |= dict.fromkeys((*between, *elsewhere), "stored otherwise")
        found |= terms
    return found
