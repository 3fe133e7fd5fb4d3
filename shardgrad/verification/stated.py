"""Verdicts that are their own explanation: nothing needs to be tried."""

from __future__ import annotations

from shardgrad.verification.diagnose import Diagnosis, Fit
from shardgrad.verification.report import Row, Verdict

_SAYS: dict[Verdict, tuple[str, str]] = {
    "frozen": (
        "it takes no gradient (requires_grad is False), on some rank, where single's does",
        "let every rank train what single trains, or freeze it in single as well",
    ),
    "trainable": (
        "it takes a gradient (requires_grad is True), on some rank, where single's is frozen",
        "freeze it on every rank, or let single train it as well",
    ),
    "not the same twice": (
        "the same step, with the same values, gives another result when it is done again",
        "look for what is done every other time, kept from one step to the next, read before it is written or its "
        "collective has ended, or drawn at random",
    ),
}


def stated(row: Row) -> Diagnosis | None:
    """Why a tensor is wrong, if its verdict says it."""
    if row.verdict not in _SAYS:
        return None
    says, remedy = _SAYS[row.verdict]
    return Diagnosis(row.kind, row.name, row.element, (Fit(row.verdict, says, remedy, "", 0.0, 0.0),))
