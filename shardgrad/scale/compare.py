"""Two results of the same cells, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardgrad.layout.units import Aligned
from shardgrad.scale.results import Line


@dataclass(frozen=True)
class Pair:
    """A cell measured twice. ratio: B's time in A's; apart: whether the quartiles do not overlap."""

    name: str
    a: Line
    b: Line

    @property
    def ratio(self) -> float:
        return self.b["seconds"] / self.a["seconds"]

    @property
    def apart(self) -> bool:
        (a_low, a_high), (b_low, b_high) = self.a["quartiles"], self.b["quartiles"]
        return a_high < b_low or b_high < a_low

    @property
    def verdict(self) -> str:
        if not self.apart:
            return "within the spread"
        return "slower" if self.ratio > 1 else "faster"


DISPENSABLE = ("bytes A", "bytes B")


def columns(both: Sequence[Pair]) -> dict[str, list[str]]:
    """The table, cells by heading; bytes only where any cell's differ."""
    times = Aligned.of([line["seconds"] for pair in both for line in (pair.a, pair.b)], prefixes="mµ")
    sent = [(max(pair.a["bytes_traced"]), max(pair.b["bytes_traced"])) for pair in both]
    amounts = Aligned.of([count for pair in sent for count in pair])
    made = {
        "cell": [pair.name for pair in both],
        f"A\n{times.prefix}s": [times.text(pair.a["seconds"]) for pair in both],
        f"B\n{times.prefix}s": [times.text(pair.b["seconds"]) for pair in both],
        "B / A": [f"{pair.ratio:.2f}" for pair in both],
        "": [pair.verdict for pair in both],
    }
    if any(a != b for a, b in sent):
        made[f"bytes A\n{amounts.prefix}B"] = [amounts.text(a) for a, _ in sent]
        made[f"bytes B\n{amounts.prefix}B"] = [amounts.text(b) for _, b in sent]
    return made


def latest(lines: Sequence[Line]) -> dict[str, Line]:
    """The last good result of every cell."""
    return {line["key"]: line for line in lines if line["status"] == "ok"}


def pairs(a: Sequence[Line], b: Sequence[Line]) -> tuple[list[Pair], list[Line], list[Line]]:
    """Cells that both have, in A's order; those that A alone has; those that B alone has."""
    first, second = latest(a), latest(b)
    both = [Pair(line["name"], line, second[key]) for key, line in first.items() if key in second]
    return (
        both,
        [line for key, line in first.items() if key not in second],
        [line for key, line in second.items() if key not in first],
    )


def about(lines: Sequence[Line]) -> dict[str, Any]:
    """What a file's results were measured with; several values are listed."""
    found: dict[str, Any] = {}
    for what in ("commit", "versions", "machine", "measuring"):
        values = list({str(line[what]): line[what] for line in lines if line["status"] == "ok"}.values())
        found[what] = values[0] if len(values) == 1 else values
    return found
