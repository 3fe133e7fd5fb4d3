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

Verdict = Literal[
    "rounding", "bug", "missing", "unexpected", "wrong shape", "not finite", "replicas differ", "frozen", "trainable",
    "not the same twice", "cannot tell", "term of a sum", "term of a mean", "stored otherwise",
    "not judged",
]  # fmt: skip
NOT_ACCUSED: tuple[Verdict, ...] = (
    "rounding",
    "cannot tell",
    "term of a sum",
    "term of a mean",
    "stored otherwise",
    "not judged",
)


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
    verdict: "rounding", or what is wrong; "cannot tell": beyond rounding in the working precision, and right in
        float64; "term of a sum", "of a mean": the ranks' tensors add up to it, and what follows is right; "not judged":
        zero; "stored otherwise": an intermediate tensor, while all that a step leaves is right.
    in_float64: whether the numbers are those of the step in float64, of which float32's rounding is the yardstick.
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
    in_float64: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is not accused."""
        return self.verdict in NOT_ACCUSED

    @property
    def score(self) -> float:
        """How much of what is allowed the tensor uses: above 1 it is wrong. Infinite if it is missing or not finite."""
        if self.verdict not in (*NOT_ACCUSED, "bug", "not the same twice"):
            return float("inf")
        return max(self.ratio / self.allowed, self.element / self.element_allowed)


@dataclass(frozen=True, repr=False)
class Report:
    """The same on every rank.

    rows: every tensor that was compared, worst first.
    findings: all that is known of each tensor that is wrong, in the order of execution.
    diagnoses: explanations of the first of them, and of those after it until one is explained.
    skipped: modules' outputs that were not compared, with the reason.
    notes: what else a reader should know: how the second step was run, and what this cannot see.
    mesh_shape, dtype, runs: the mesh, the working precision, how many runs of one device the yardstick is made of.
    """

    rows: tuple[Row, ...]
    findings: tuple[Observed, ...]
    skipped: Mapping[str, str]
    mesh_shape: Mapping[str, int]
    dtype: str
    runs: int
    diagnoses: tuple[Diagnosis, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is accused, and something was judged."""
        return all(row.ok for row in self.rows) and not self.idle

    @property
    def idle(self) -> bool:
        """Whether every gradient is zero, so that nothing was judged."""
        found = [row for row in self.rows if row.kind == "gradient"]
        return bool(found) and all(row.verdict == "not judged" for row in found)

    def with_verdict(self, verdict: Verdict) -> tuple[Row, ...]:
        """The rows of a verdict, in the order of execution."""
        return tuple(sorted((row for row in self.rows if row.verdict == verdict), key=lambda row: row.order))

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

    def __str__(self) -> str:
        return self.summary()

    __repr__ = __str__

    def to_json(self) -> str:
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
                "notes": list(self.notes),
            },
            indent=2,
            allow_nan=False,
        )

    def summary(self) -> str:
        """A few lines: what is wrong, or that nothing is; what cannot be told, and what was not judged."""
        mesh = ", ".join(f"{axis}={ranks}" for axis, ranks in self.mesh_shape.items())
        wrong = sum(not row.ok for row in self.rows)
        where = f"({self.dtype}, mesh {mesh})"
        first, judged = self.first, self.with_verdict("rounding")
        lines = []
        if first is not None:
            lines.append(f"{wrong} of {len(self.rows)} tensors are not what one device computes {where}")
            lines.append(f"first in the order of execution: the {first.kind} of {first.name}, {_where(first)}")
        elif self.idle:
            lines.append(
                f"cannot tell: every gradient is zero {where}, so that nothing was judged; give a batch, values or a "
                "loss that move them"
            )
        else:
            all_ = "all" if len(judged) == len(self.rows) else f"{len(judged)} of"
            worst = max((row.ratio for row in judged), default=0.0)
            lines.append(
                f"{all_} {len(self.rows)} tensors differ by rounding alone {where}: at most {worst:.2g} times one "
                "device's"
            )
        for verdict, says in _NOT_ACCUSED.items():
            rows = self.with_verdict(verdict)
            if rows and not (verdict == "not judged" and self.idle):
                lines.append(f"{len(rows)} {'is' if len(rows) == 1 else 'are'} {says.format(dtype=self.dtype)}: "
                             f"{_names(rows)}")  # fmt: skip
        return "\n".join((*lines, *self.notes))

    def table(self, most: int = 20) -> str:
        """The rows as a table for a terminal, worst first, and the summary.

        Args:
            most: rows to show; all that are wrong are counted in the summary.
        """
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=100, highlight=False)
        self.show(console, most)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def show(self, console: Console, most: int = 20) -> None:
        """The same, printed with colours where the console has them."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title="norm, and worst element: times the rounding of one device (allowed)",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        shown = [
            (
                *(row.kind, f"{row.error:.1e}", _times(row.ratio, row.allowed)),
                *(_times(row.element, row.element_allowed), row.verdict),
            )
            for row in self.rows[:most]
        ]
        headings = ("", "error", "norm", "worst", "")
        taken = sum(max(map(len, column)) + 2 for column in zip(headings, *shown))
        room = max(16, min(32, console.width - taken))  # names alone are shortened
        table.add_column("tensor", no_wrap=True, min_width=room)
        for column in headings:
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for row, (*cells, verdict) in zip(self.rows, shown):
            colour = "green" if row.verdict == "rounding" else "yellow" if row.ok else "bold red"
            table.add_row(_shortened(row.name, room), *cells, Text(verdict, style=colour))
        console.print(table)
        if len(self.rows) > most:
            console.print(f"… and {len(self.rows) - most} more, none of them worse", style="dim")
        if self.skipped:
            console.print(f"not compared: {len(self.skipped)} outputs, such as {_first_of(self.skipped)}", style="dim")
        console.print(Text(self.summary(), style="green" if self.ok else "bold red"))
        for diagnosis in self.diagnoses:
            console.print(Text(str(diagnosis)))


_NOT_ACCUSED: dict[Verdict, str] = {
    "cannot tell": "'cannot tell': right in float64, beyond rounding in {dtype}, and alike each time (a point on a "
    "jump, as ReLU's at zero or a choice among equals; another formula; a lower precision by design). To know, compare "
    "in float32 or float64, or with another seed",
    "term of a sum": "a term of a sum on each rank, and what follows is right: say so in `splits`, as Y[n,m]{{axis}}",
    "term of a mean": "of each rank's own mean, and gradients of parameters are right: data parallelism that averages",
    "stored otherwise": "not single's value where it was looked for, and all that is made of it is right (another "
    "order of dims, a factor that comes later): say in `splits` how it is stored, or leave it out by `skip`",
    "not judged": "zero everywhere, and so not judged",
}


def _names(rows: tuple[Row, ...], most: int = 4) -> str:
    shown = ", ".join(f"{row.kind} of {row.name}" for row in rows[:most])
    return f"{shown} and {len(rows) - most} more" if len(rows) > most else shown


def _first_of(skipped: Mapping[str, str]) -> str:
    name, reason = next(iter(skipped.items()))
    return f"{name} ({reason})"


def _where(row: Row) -> str:
    at = f"worst on rank {row.rank}"
    if row.index:
        at += f" at [{', '.join(map(str, row.index))}]"
    precision = ", in float64 beside float32's rounding" if row.in_float64 else ""
    return {
        "missing": f"which rank {row.rank} does not have",
        "unexpected": f"which rank {row.rank} has and one device has not",
        "wrong shape": f"which has another shape on rank {row.rank} than {row.split} of {row.shape} leaves it",
        "not finite": f"{at}: it is not finite, there or on one device in this precision",
        "frozen": f"which takes no gradient on rank {row.rank} (requires_grad), where single's does",
        "trainable": f"which takes a gradient on rank {row.rank} (requires_grad), where single's is frozen",
        "not the same twice": f"{at}: the same step, done again, gives another result",
    }.get(row.verdict, f"{at}, stored as {row.split}: {row.ratio:.3g} times rounding (allowed {row.allowed:.3g}), "
           f"an element {row.element:.3g} times (allowed {row.element_allowed:.3g}){precision}")  # fmt: skip


def _times(ratio: float, allowed: float) -> str:
    return f"{ratio:.0e} ({allowed:.0f})" if ratio >= 1e4 else f"{ratio:.3g} ({allowed:.0f})"


def _shortened(name: str, most: int) -> str:
    """A name shortened at its beginning: its end says more."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in values.items()}
