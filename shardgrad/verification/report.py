"""What a verification found: a row for each tensor, the places that are wrong, and how they are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from shardgrad.verification.diagnose import Diagnosis
from shardgrad.verification.observed import Kind, Observed

if TYPE_CHECKING:
    from rich.console import Console

Verdict = Literal["rounding", "bug", "missing", "unexpected", "wrong shape", "not finite", "replicas differ"]
BACKWARD: tuple[Kind, ...] = ("output gradient", "input gradient", "gradient")


@dataclass(frozen=True)
class Row:
    """One tensor of the parallel model against the same on one device.

    name, kind, split, shape: which tensor, how it lies on the mesh, its global shape.
    order: its place in the order of execution.
    error: Euclidean distance from float64, on the rank where it is worst.
    yardstick: what rounding does to the same part of the tensor on one device, in the working precision.
    ratio: error / yardstick.
    allowed: how large the ratio may be.
    element: the largest error of one element, in units of what rounding does to that element; element_allowed likewise.
    index, rank: where that element is in the global tensor, and the rank (in the mesh's order) that holds it so.
    verdict: "rounding", or what is wrong.
    """

    name: str
    kind: Kind
    split: str
    shape: tuple[int, ...]
    order: int
    error: float
    yardstick: float
    ratio: float
    allowed: float
    element: float
    element_allowed: float
    index: tuple[int, ...]
    rank: int
    verdict: Verdict

    @property
    def ok(self) -> bool:
        return self.verdict == "rounding"

    @property
    def score(self) -> float:
        """How much of what is allowed the tensor uses: above 1 it is wrong. Infinite if it is missing or not finite."""
        if self.verdict not in ("rounding", "bug"):
            return float("inf")
        return max(self.ratio / self.allowed, self.element / self.element_allowed)


@dataclass(frozen=True)
class Report:
    """The same on every rank.

    rows: every tensor that was compared, worst first.
    findings: all that is known of each tensor that is wrong, in the order of execution.
    diagnoses: explanations of the first of them, and of those after it until one is explained.
    skipped: modules' outputs that were not compared, with the reason.
    mesh_shape, dtype, runs: the mesh, the working precision, how many runs of one device the yardstick is made of.
    """

    rows: tuple[Row, ...]
    findings: tuple[Observed, ...]
    skipped: Mapping[str, str]
    mesh_shape: Mapping[str, int]
    dtype: str
    runs: int
    diagnoses: tuple[Diagnosis, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every tensor's difference is rounding."""
        return all(row.ok for row in self.rows)

    @property
    def first(self) -> Row | None:
        """The first tensor, in the order of execution, that is wrong: where to look."""
        return min((row for row in self.rows if not row.ok), key=lambda row: row.order, default=None)

    def __getitem__(self, name: str) -> Row:
        """The row of a parameter's gradient or, if there is none, the worst row of that name."""
        rows = [row for row in self.rows if row.name == name]
        if not rows:
            raise KeyError(name)
        return next((row for row in rows if row.kind == "gradient"), rows[0])

    def to_json(self, indent: int | None = 2) -> str:
        """Everything but the tensors. Infinite and undefined numbers are written as null."""
        first = self.first
        return json.dumps(
            {
                "ok": self.ok,
                "mesh": dict(self.mesh_shape),
                "dtype": self.dtype,
                "runs": self.runs,
                "first": None if first is None else {"kind": first.kind, "name": first.name},
                "rows": [_plain({**asdict(row), "ok": row.ok, "score": row.score}) for row in self.rows],
                "diagnoses": [
                    {**_plain(asdict(one)), "fits": [_plain(asdict(fit)) for fit in one.fits]} for one in self.diagnoses
                ],
                "skipped": dict(self.skipped),
            },
            indent=indent,
            allow_nan=False,
        )

    def summary(self) -> str:
        """One or two lines."""
        mesh = ", ".join(f"{axis}={ranks}" for axis, ranks in self.mesh_shape.items())
        wrong = sum(not row.ok for row in self.rows)
        where = f"({self.dtype}, mesh {mesh})"
        first = self.first
        if first is None:
            worst = max((row.ratio for row in self.rows), default=0.0)
            return (
                f"all {len(self.rows)} tensors differ by rounding alone {where}: at most {worst:.2g} times one device's"
            )
        return (
            f"{wrong} of {len(self.rows)} tensors are not what one device computes {where}\n"
            f"first in the order of execution: the {first.kind} of {first.name}, {_where(first)}"
        )

    def table(self, most: int = 20, *, width: int | None = None) -> str:
        """The rows as a table for a terminal, worst first, and the summary.

        Args:
            most: rows to show; all that are wrong are counted in the summary.
        """
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=width or 100, highlight=False)
        self.show(console, most)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def show(self, console: Console, most: int = 20) -> None:
        """The same, printed with colours where the console has them."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title="times the rounding of one device (allowed)", title_justify="left", box=None, pad_edge=False
        )
        table.add_column("tensor", no_wrap=True, max_width=32)
        table.add_column("", no_wrap=True)
        for column in ("error", "norm", "worst element"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for row in self.rows[:most]:
            verdict = Text(row.verdict, style="green" if row.ok else "bold red")
            norm, element = _times(row.ratio, row.allowed), _times(row.element, row.element_allowed)
            table.add_row(_shortened(row.name, 32), row.kind, f"{row.error:.1e}", norm, element, verdict)
        console.print(table)
        if len(self.rows) > most:
            console.print(f"… and {len(self.rows) - most} more, none of them worse", style="dim")
        if self.skipped:
            console.print(f"not compared: {len(self.skipped)} outputs, such as {_first_of(self.skipped)}", style="dim")
        console.print(Text(self.summary(), style="green" if self.ok else "bold red"))
        for diagnosis in self.diagnoses:
            console.print(Text(str(diagnosis)))


def _first_of(skipped: Mapping[str, str]) -> str:
    name, reason = next(iter(skipped.items()))
    return f"{name} ({reason})"


def _where(row: Row) -> str:
    at = f"worst on rank {row.rank}"
    if row.index:
        at += f" at [{', '.join(map(str, row.index))}]"
    return {
        "missing": f"which rank {row.rank} does not have",
        "unexpected": f"which rank {row.rank} has and one device has not",
        "wrong shape": f"which has another shape on rank {row.rank} than {row.split} of {row.shape} leaves it",
        "not finite": f"{at}: it is not finite, there or on one device in this precision",
    }.get(row.verdict, f"{at}, stored as {row.split}: {row.ratio:.3g} times rounding (allowed {row.allowed:.3g}), "
           f"an element {row.element:.3g} times (allowed {row.element_allowed:.3g})")  # fmt: skip


def _times(ratio: float, allowed: float) -> str:
    return f"{ratio:.0e} ({allowed:.0f})" if ratio >= 1e4 else f"{ratio:.3g} ({allowed:.0f})"


def _shortened(name: str, most: int) -> str:
    """A name shortened at its beginning: its end says more."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in values.items()}
