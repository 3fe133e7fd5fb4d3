"""A picture of a report: how far every tensor is from float64, in the order of execution."""

from __future__ import annotations

from math import inf
from pathlib import Path

from shardgrad.verification.observed import BACKWARD
from shardgrad.verification.report import Report, Row

_GROUPS = (
    ("outputs and loss", ("output", "loss"), "o", "#1f6fb4"),
    ("gradients of outputs and inputs", ("output gradient", "input gradient"), "^", "#e08214"),
    ("gradients of parameters", ("gradient",), "s", "#4d9221"),
    ("norm, steps, buffers", ("norm", "step", "second step", "buffer"), "D", "#7a5195"),
)
_LABELS = 14  # names along the bottom
_LOWEST = 1e-3  # what is exactly right is drawn here


def draw(report: Report, path: str | Path) -> None:
    """Write the picture; the suffix says the format (png, svg, pdf)."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in report.rows if row.kind != "value"), key=lambda row: row.order)
    finite = [row.score for row in rows if row.score < inf]
    top = 10 * max([1.0, *finite])
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    at = {id(row): place for place, row in enumerate(rows)}
    for label, kinds, marker, colour in _GROUPS:
        own = [row for row in rows if row.kind in kinds]
        axes.scatter(
            [at[id(row)] for row in own], [_height(row, top) for row in own], s=16, marker=marker, color=colour,
            label=label, linewidths=0, alpha=0.85, zorder=3,
        )  # fmt: skip
    wrong = [row for row in rows if not row.ok]
    if wrong:
        axes.scatter(
            [at[id(row)] for row in wrong], [_height(row, top) for row in wrong], s=70, facecolors="none",
            edgecolors="#c51b1b", linewidths=1.1, label="accused", zorder=4,
        )  # fmt: skip
    unsure = [row for row in rows if row.ok and row.score > 1]
    if unsure:
        axes.scatter(
            [at[id(row)] for row in unsure], [_height(row, top) for row in unsure], s=70, facecolors="none",
            edgecolors="#e0a800", linewidths=1.1, label="not accused: see the table", zorder=4,
        )  # fmt: skip
    axes.axhline(1.0, color="#c51b1b", linewidth=1.2, zorder=2)
    axes.text(len(rows) - 0.5, 0.8, "rounding", fontsize=8.5, color="#4d9221", ha="right", va="top")
    axes.axhspan(_LOWEST / 2, 1.0, color="#4d9221", alpha=0.06, linewidth=0, zorder=0)
    _phases(axes, rows)
    first = report.first
    if first is not None and first.kind != "value":
        place = at[id(first)]
        axes.annotate(
            f"first: {first.kind} of {first.name}", (place, _height(first, top)), xytext=(0.5, 0.94),
            textcoords="axes fraction", ha="center", color="#c51b1b", fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "#c51b1b", "linewidth": 0.8, "shrinkB": 6},
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(_LOWEST / 2, top * 4)
    axes.set_xlim(-1, max(len(rows), 1))
    axes.set_ylabel("error, as a share of what rounding allows")
    every = max(1, -(-len(rows) // _LABELS))
    axes.set_xticks(range(0, len(rows), every))
    axes.set_xticklabels([_short(row.name) for row in rows[::every]], rotation=30, ha="right", fontsize=7.5)
    mesh = ", ".join(f"{axis} = {ranks}" for axis, ranks in report.mesh_shape.items())
    axes.set_title(f"against one device in float64 ({report.dtype}, {mesh})", loc="left", fontsize=11, pad=22)
    axes.grid(axis="y", which="major", color="#dddddd", linewidth=0.6, zorder=1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, handletextpad=0.2)
    figure.savefig(path)


def _height(row: Row, top: float) -> float:
    return min(max(row.score, _LOWEST), top)


def _phases(axes: object, rows: list[Row]) -> None:
    """Thin lines where backward begins, and the step."""
    starts = {"forward": 0}
    for place, row in enumerate(rows):
        if row.kind in BACKWARD:
            starts.setdefault("backward", place)
        if row.kind in ("norm", "step"):
            starts.setdefault("step", place)
    for name, place in starts.items():
        if place:
            axes.axvline(place - 0.5, color="#999999", linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)  # type: ignore[attr-defined]
        axes.text(place + 0.1, 1.01, name, fontsize=8.5, color="#666666", transform=axes.get_xaxis_transform())  # type: ignore[attr-defined]


def _short(name: str) -> str:
    """The last parts of a name, as many as fit."""
    parts = name.split(".")
    while len(".".join(parts)) > 22 and len(parts) > 1:
        parts.pop(0)
    return ".".join(parts)
