"""Whether a tensor is a term of a sum on each rank: not wrong, if what follows has been made of the sum."""

from __future__ import annotations

from collections.abc import Mapping

from shardgrad.verification.hypothesis import Evidence
from shardgrad.verification.observed import Kind, Observed
from shardgrad.verification.record import Key
from shardgrad.verification.report import Row

_FORWARD: tuple[Kind, ...] = ("output", "loss", "buffer")


def summed_axes(found: Observed) -> tuple[str, ...]:
    """The fewest axes over which what the ranks hold adds up to the right tensor; none if it does not, or is alike."""
    if any(tensor is None for tensor in found.locals):
        return ()
    seen = Evidence(found)
    for axes, _ in seen.axes(sharded=False) if seen.fits else ():
        sums = seen.summed(seen.held, axes)
        sizes = seen.summed(seen.size, axes)
        if all(
            bool(((total - right).abs() <= seen.allowed * size).all())
            for total, right, size in zip(sums, seen.right, sizes)
        ):
            return axes
    return ()


def terms(rows: Mapping[Key, Row], findings: Mapping[Key, Observed]) -> dict[Key, tuple[str, ...]]:
    """Of the wrong outputs, losses and gradients of outputs, those that are terms of a sum by the program's design, and
    the axes: everything that is computed after them, in forward or in backward, is right, or such a term as well."""
    over = {
        key: summed_axes(found)
        for key, found in findings.items()
        if key[0] in ("output", "output gradient", "loss") and rows[key].verdict == "bug"
    }
    found: dict[Key, tuple[str, ...]] = {}
    for key in sorted((key for key, axes in over.items() if axes), key=lambda key: -rows[key].order):
        forward = key[0] in _FORWARD and key[0] != "loss"
        later = [other for other, row in rows.items() if row.order > rows[key].order]
        later = [other for other in later if not forward or other[0] in _FORWARD]
        if later and all(rows[other].ok or other in found for other in later):
            found[key] = over[key]
    return found
