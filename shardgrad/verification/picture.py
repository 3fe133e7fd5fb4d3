"""A picture of a report: how far every tensor is from float64, in the order of execution."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from shardgrad.verification.observed import BACKWARD
from shardgrad.verification.report import Report, Row

_GROUPS = (
    ("outputs and loss", ("output", "loss")),
    ("gradients of outputs and inputs", ("output gradient", "input gradient")),
    ("gradients of parameters", ("gradient",)),
    ("norm, steps, buffers", ("norm", "step", "second step", "buffer")),
)
_LABELS = 14  # names along the bottom
_LOWEST = 1e-3  # what is exactly right is drawn here
_UNSURE = "#e0a800"


def draw(report: Report, path: str | Path) -> None:
    """Write the picture; the suffix says the format (png, svg, pdf)."""
    from shardgrad import charts  # matplotlib takes its time

    rows = sorted((row for row in report.rows if row.kind != "value"), key=lambda row: row.order)
    top = 10 * max([1.0, *(row.score for row in rows if row.score < inf)])
    at = {id(row): place for place, row in enumerate(rows)}
    mesh = ", ".join(f"{axis} = {ranks}" for axis, ranks in report.mesh_shape.items())
    with charts.chart(Path(path), f"Against one device in float64 ({report.dtype}, {mesh})", (10, 5)) as figure:
        axes = figure.subplots()
        charts.plain(axes, "y")
        axes.set_ylabel("error, over what rounding allows")

        def points(some: Sequence[Row], **more: Any) -> None:
            if some:
                axes.scatter([at[id(row)] for row in some], [_height(row, top) for row in some], **more)

        for number, (label, kinds) in enumerate(_GROUPS):
            mark = {"color": charts.SERIES[number], "marker": charts.MARKERS[number]}
            points([row for row in rows if row.kind in kinds], s=16, label=label, linewidths=0, zorder=3, **mark)
        ring: dict[str, Any] = {"s": 70, "facecolors": "none", "linewidths": 1.1, "zorder": 4}
        points([row for row in rows if not row.ok], label="accused", edgecolors=charts.WRONG, **ring)
        unsure = [row for row in rows if row.ok and row.score > 1]
        points(unsure, label="not accused: see the table", edgecolors=_UNSURE, **ring)
        axes.axhspan(_LOWEST / 2, 1.0, color=charts.SERIES[2], alpha=0.06, linewidth=0, zorder=0)
        axes.axhline(1.0, color=charts.WRONG, linewidth=1.2, zorder=2)
        axes.text(len(rows) - 0.5, 0.8, "rounding", fontsize=8.5, color=charts.SERIES[2], ha="right", va="top")
        _phases(axes, rows)
        axes.set_yscale("log")
        axes.set_ylim(_LOWEST / 2, top * (top / _LOWEST) ** 0.15)  # with room for words above every point
        axes.set_xlim(-1, max(len(rows), 1))
        _heights(axes, top, any(row.score == inf for row in rows))
        first = report.first if report.first is not None and report.first.kind != "value" else None
        _names(axes, rows, None if first is None else at[id(first)])
        if first is not None:
            _point_out(axes, first, at[id(first)], len(rows), _height(first, top), top, charts.WRONG)
        figure.legend(loc="outside lower center", ncols=6, handletextpad=0.2)


def _height(row: Row, top: float) -> float:
    return min(max(row.score, _LOWEST), top)


def _heights(axes: Any, top: float, infinite: bool) -> None:
    """1, 10, 100, 1,000, then powers; at the top what is missing or infinite."""
    ticks = [_LOWEST]
    while ticks[-1] * 10 < top / 3:
        ticks.append(ticks[-1] * 10)
    every = -(-len(ticks) // 12)
    kept = [tick for number, tick in enumerate(ticks) if number % every == 0 or tick == 1]
    names = [f"{tick:,g}" if tick < 1e5 else f"$10^{{{len(f'{tick:.0f}') - 1}}}$" for tick in kept]
    names[0] = f"≤ {names[0]}"
    axes.set_yticks([*kept, top] if infinite else kept, [*names, "∞"] if infinite else names)
    axes.minorticks_off()


def _names(axes: Any, rows: Sequence[Row], first: int | None) -> None:
    """What stands along the bottom: as many names as there is room for, and that of the first that is accused."""
    every = max(1, -(-len(rows) // _LABELS))
    places = [place for place in range(0, len(rows), every) if first is None or abs(place - first) >= every * 0.7]
    places = sorted([*places, first] if first is not None else places)
    axes.set_xticks(places, [_named(rows[place]) for place in places], rotation=30, ha="right", fontsize=7.5)
    axes.set_xlabel("tensors in the order of execution (d: gradient of)")


def _named(row: Row) -> str:
    """`mlp.up`, and `d mlp.up` of a gradient: the last parts of a name, as many as fit."""
    parts = row.name.split(".")
    while len(".".join(parts)) > 24 and len(parts) > 1:
        parts.pop(0)
    return f"d {'.'.join(parts)}" if "gradient" in row.kind else ".".join(parts)


def _point_out(axes: Any, row: Row, place: int, count: int, height: float, top: float, ink: str) -> None:
    """The first that is accused: straight above it, where no other point is."""
    align = "left" if place < 0.3 * count else "right" if place > 0.7 * count else "center"
    axes.annotate(
        f"first: {row.kind} of {row.name}", (place, height), xytext=(place, top * (top / _LOWEST) ** 0.07),
        ha=align, va="bottom", color=ink, fontsize=9,
        arrowprops={"arrowstyle": "-", "color": ink, "linewidth": 0.8, "shrinkB": 5, "relpos": (
            {"left": 0.0, "right": 1.0, "center": 0.5}[align], 0.0)},
    )  # fmt: skip


def _phases(axes: Any, rows: Sequence[Row]) -> None:
    """Thin lines where backward begins, and the steps."""
    starts = {"forward": 0}
    for place, row in enumerate(rows):
        if row.kind in BACKWARD:
            starts.setdefault("backward", place)
        if row.kind in ("norm", "step"):
            starts.setdefault("step", place)
        if row.kind == "second step":
            starts.setdefault("second step", place)
    for name, place in starts.items():
        if place:
            axes.axvline(place - 0.5, color="#999999", linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
        axes.text(
            max(place - 0.3, -0.8), 1.01, name, fontsize=8.5, color="#666666", transform=axes.get_xaxis_transform()
        )
