"""Pictures of an experiment: speed-up and efficiency, where the time goes, and bytes predicted beside bytes traced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from shardgrad.layout.units import format_si
from shardgrad.scale import machine
from shardgrad.scale.table import Row, seconds

# Paul Tol's bright palette; markers differ too, so that curves are distinct without colours.
_SERIES = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_COMPUTING, _COMMUNICATING = "#77AADD", "#EE8866"
_OPERATIONS = {"all-gather": "#44BB99", "reduce-scatter": "#EEDD88", "all-reduce": "#EE8866", "other": "#FFAABB"}
_INK, _GREY, _FAINT = "#1a1a1a", "#5c5c5c", "#dddddd"
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "shardgrad", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.edgecolor": _GREY, "axes.labelcolor": _INK, "xtick.color": _GREY, "ytick.color": _GREY,
    "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "axes.linewidth": 0.7,
}  # fmt: skip
_WIDTH = 9.0


def draw(title: str, rows: Sequence[Row], folder: Path, ending: str, prefix: str = "") -> list[Path]:
    """Draw what the rows have figures for; returns the files."""
    rows = [row for row in rows if row.ok]
    made = {}
    with rc_context(_SETTINGS):
        if any(row.speed_up is not None for row in rows):
            made["speed-up"] = _speed_up(title, rows)
        if rows:
            made["time"] = _time(title, rows)
            made["bytes"] = _bytes(title, rows)
        files = []
        for name, figure in made.items():
            files.append(folder / f"{prefix}{'-' if prefix else ''}{name}.{ending}")
            date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending, {})
            figure.savefig(files[-1], dpi=160, metadata=date)
    return files


def _figure(title: str, height: float, rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    repeats = sorted({line["measuring"]["repeats"] for row in rows for line in [row.line]})
    where = sorted({machine.describe_machine(row.line["machine"]) for row in rows})
    backends = sorted({str(row.planned.cell.backend) for row in rows})
    figure.supxlabel(
        f"{'; '.join(where)}; {', '.join(backends)}; torch {rows[0].line['versions']['torch']}; "
        f"medians of {', '.join(map(str, repeats))} steps, bars: quartiles",
        x=0.01,
        ha="left",
        fontsize=7.5,
        color=_GREY,
    )
    return figure


def _plain(axes: Any, grid: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _by_series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.planned.series, []).append(row)
    return {series: sorted(mine, key=lambda row: row.ranks) for series, mine in found.items()}


def _speed_up(title: str, rows: Sequence[Row]) -> Figure:
    figure = _figure(title, 4.2, rows)
    speed, efficiency = figure.subplots(1, 2)
    counts = sorted({row.ranks for row in rows})
    least, most = counts[0], counts[-1]
    cores = min(row.line["machine"]["cores"] for row in rows)
    on_cpu = any(row.planned.cell.device == "cpu" for row in rows)
    speed.plot([least, most], [least, most], color=_GREY, linewidth=1, linestyle=(0, (5, 3)), label="ideal")
    efficiency.axhline(1, color=_GREY, linewidth=1, linestyle=(0, (5, 3)))
    if on_cpu and cores < most:
        edge = [count for count in dict.fromkeys([least, cores, *counts]) if count >= least]
        edge.sort()
        limit = [min(count, cores) for count in edge]
        label = f"ideal on {cores} cores"
        speed.plot(edge, limit, color=_GREY, linewidth=1, linestyle=(0, (1, 2)), label=label)
        smooth = [cores + at * (most - cores) / 40 for at in range(41)]
        efficiency.plot([least, *smooth], [1, *(cores / x for x in smooth)], color=_GREY, lw=1, ls=(0, (1, 2)))
    drawn = 0
    for mine in _by_series(rows).values():
        mine = [row for row in mine if row.speed_up is not None]
        if not mine:
            continue
        look: dict[str, Any] = {
            "color": _SERIES[drawn % len(_SERIES)], "marker": _MARKERS[drawn % len(_MARKERS)],
            "markersize": 5.5, "linewidth": 1.6, "capsize": 2.5, "elinewidth": 1,
        }  # fmt: skip
        ranks = [row.ranks for row in mine]
        middles, spread = _spread(mine, [1] * len(mine))
        speed.errorbar(ranks, middles, spread, label=mine[0].planned.label or "measured", **look)
        middles, spread = _spread(mine, ranks)
        efficiency.errorbar(ranks, middles, spread, **look)
        drawn += 1
    for axes in (speed, efficiency):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("ranks")
        _plain(axes, "both")
    speed.set_yscale("log", base=2)
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    speed.yaxis.set_minor_locator(NullLocator())
    speed.set_title("speed-up, in FLOP/s", loc="left", fontsize=9)
    efficiency.set_title("efficiency of each rank", loc="left", fontsize=9)
    efficiency.set_ylim(0, max(1.15, efficiency.get_ylim()[1]))
    efficiency.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    lines, labels = speed.get_legend_handles_labels()
    if max(map(len, labels)) < 24:
        figure.legend(lines, labels, loc="outside right upper", frameon=False, fontsize=8.5)
    else:
        speed.legend(lines, labels, loc="best", fontsize=8, framealpha=0.9, edgecolor=_FAINT)
    return figure


def _spread(rows: Sequence[Row], over: Sequence[int]) -> tuple[list[float], list[list[float]]]:
    middles, below, above = [], [], []
    for row, ranks in zip(rows, over):
        assert row.speed_up is not None
        assert row.speed_up_quartiles is not None
        low, high = row.speed_up_quartiles
        middles.append(row.speed_up / ranks)
        below.append(max(0.0, row.speed_up - low) / ranks)
        above.append(max(0.0, high - row.speed_up) / ranks)
    return middles, [below, above]


def _places(rows: Sequence[Row]) -> tuple[list[Row], list[float], list[str]]:
    """Rows as bars from the top, series apart; heights and names."""
    listed, places, at = [], [], 0.0
    for mine in _by_series(rows).values():
        for row in mine:
            listed.append(row)
            places.append(at)
            at += 1
        at += 0.6 if len(mine) > 1 else 0
    return listed, places, [row.planned.name for row in listed]


def _bars(title: str, rows: Sequence[Row], each: float) -> tuple[Figure, Any, list[Row], list[float]]:
    listed, places, names = _places(rows)
    figure = _figure(title, 1.35 + each * (places[-1] + 1), rows)
    axes = figure.subplots()
    axes.set_yticks(places, names)
    axes.set_ylim(places[-1] + 0.65, -0.65)
    axes.tick_params(axis="y", length=0)
    _plain(axes, "x")
    return figure, axes, listed, places


def _time(title: str, rows: Sequence[Row]) -> Figure:
    figure, axes, listed, places = _bars(title, rows, 0.3)
    unit, scale = ("s", 1.0) if max(row.line["seconds"] for row in listed) >= 10 else ("ms", 1e3)
    right = max(row.line["quartiles"][1] for row in listed) * scale
    for row, y in zip(listed, places):
        line = row.line
        whole, communicating = line["seconds"] * scale, (line["communicating"] or 0.0) * scale
        axes.barh(y, whole - communicating, 0.72, color=_COMPUTING)
        axes.barh(y, communicating, 0.72, left=whole - communicating, color=_COMMUNICATING)
        low, high = (value * scale for value in line["quartiles"])
        axes.plot([low, high], [y, y], color=_INK, linewidth=1.1, solid_capstyle="butt")
        for edge in (low, high):
            axes.plot([edge, edge], [y - 0.13, y + 0.13], color=_INK, linewidth=1.1)
        axes.text(max(whole, high) + right * 0.012, y, seconds(line["seconds"]), va="center", fontsize=8, color=_INK)
    axes.set_xlim(0, right * 1.1)
    axes.set_xlabel(f"time of a step, {unit}")
    whole = any(row.line["communicating"] is None for row in listed)
    legend = [
        Patch(color=_COMPUTING, label="the whole step" if whole else "computing"),
        Patch(color=_COMMUNICATING, label="communicating, or waiting for others"),
    ]
    figure.legend(handles=legend[: 1 if whole else 2], loc="outside upper right", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _bytes(title: str, rows: Sequence[Row]) -> Figure:
    figure, axes, listed, places = _bars(title, rows, 0.36)
    most = max(max(row.line["bytes_predicted"] + row.line["bytes_traced"]) for row in listed)
    scale, unit = next(
        ((scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= scale), (1.0, "B")
    )
    used: set[str] = set()
    for row, y in zip(listed, places):
        for what, offset, alpha in (("predicted_of_most", -0.2, 0.45), ("traced_of_most", 0.2, 1.0)):
            left = 0.0
            for name, count in row.line[what].items():
                operation = name.partition(" over ")[0]
                operation = operation if operation in _OPERATIONS else "other"
                used.add(operation)
                axes.barh(y + offset, count / scale, 0.38, left=left, color=_OPERATIONS[operation], alpha=alpha,
                          edgecolor="white", linewidth=0.4)  # fmt: skip
                left += count / scale
            word = what.partition("_")[0]
            count = sum(row.line[what].values())
            axes.text(left + most / scale * 0.008, y + offset, f"{format_si(count, 'B')} {word}", va="center",
                      fontsize=6.8, color=_INK if word == "traced" else _GREY)  # fmt: skip
    axes.set_xlim(0, max(most / scale, 1e-9) * 1.2)
    axes.set_xlabel(f"{unit} that the rank which sends most sends in a step")
    handles = [Patch(color=colour, label=name) for name, colour in _OPERATIONS.items() if name in used]
    if handles:
        figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=8.5)
    return figure
