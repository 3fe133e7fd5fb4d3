"""Pictures of an experiment: speed-up and efficiency, where the time goes, and bytes predicted beside bytes traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from shardgrad import charts
from shardgrad.layout.units import format_si
from shardgrad.scale import idle, machine
from shardgrad.scale.table import Row, rate_unit, seconds

_COMPUTING, _COMMUNICATING = "#77AADD", "#EE8866"
_WIDTH = 9.0
_MOST_NOTES = 3  # of idle ranks; the table has all


def draw(title: str, rows: Sequence[Row], folder: Path, ending: str, prefix: str = "") -> list[Path]:
    """Draw what the rows have figures for, and what has none as failed or skipped; returns the files."""
    good = [row for row in rows if row.ok]
    if not good:
        return []
    made: dict[str, tuple[Callable[[Figure, Sequence[Row]], None], float]] = {}
    if any(row.speed_up is not None for row in rows):
        made["speed-up"] = _speed_up, 4.2
    heights = _places(rows)[1][-1] + 1
    made["time"] = _time, 1.35 + 0.3 * heights
    made["bytes"] = _bytes, 1.35 + 0.36 * heights
    files = []
    for name, (panels, height) in made.items():
        files.append(folder / f"{prefix}{'-' if prefix else ''}{name}.{ending}")
        with charts.chart(files[-1], title, (_WIDTH, height), _note(good)) as figure:
            panels(figure, rows)
    return files


def _note(rows: Sequence[Row]) -> str:
    repeats = sorted({row.line["measuring"]["repeats"] for row in rows})
    where = sorted({machine.describe_machine(row.line["machine"]) for row in rows})
    backends = sorted({str(row.planned.cell.backend) for row in rows})
    first = (
        f"{'; '.join(where)}; {', '.join(backends)}; torch {rows[0].line['versions']['torch']}; "
        f"medians of {', '.join(map(str, repeats))} steps, bars: quartiles"
    )
    idle_ranks = dict.fromkeys(note for row in rows for note in idle.notes(row.planned.cell))
    return "\n".join([first, *list(idle_ranks)[:_MOST_NOTES]])


def _by_series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.planned.series, []).append(row)
    return {series: sorted(mine, key=lambda row: row.ranks) for series, mine in found.items()}


def _speed_up(figure: Figure, rows: Sequence[Row]) -> None:
    speed, efficiency = figure.subplots(1, 2)
    counts = sorted({row.ranks for row in rows})
    least, most = counts[0], counts[-1]
    cores = min(row.line["machine"]["cores"] for row in rows if row.ok)
    on_cpu = any(row.planned.cell.device == "cpu" for row in rows)
    speed.plot([least, most], [least, most], color=charts.GREY, linewidth=1, linestyle=(0, (5, 3)), label="ideal")
    efficiency.axhline(1, color=charts.GREY, linewidth=1, linestyle=(0, (5, 3)))
    if on_cpu and cores < most:
        edge = [count for count in dict.fromkeys([least, cores, *counts]) if count >= least]
        edge.sort()
        limit = [min(count, cores) for count in edge]
        label = f"ideal on {cores} cores"
        speed.plot(edge, limit, color=charts.GREY, linewidth=1, linestyle=(0, (1, 2)), label=label)
        smooth = [cores + at * (most - cores) / 40 for at in range(41)]
        efficiency.plot([least, *smooth], [1, *(cores / x for x in smooth)], color=charts.GREY, lw=1, ls=(0, (1, 2)))
    several = {series: mine for series, mine in _by_series(rows).items() if any(r.speed_up is not None for r in mine)}
    for at, mine in enumerate(several.values()):
        found = [row for row in mine if row.speed_up is not None]
        ranks = [row.ranks for row in found]
        charts.spreads(
            speed, ranks, _spreads(found, [1] * len(found)), at, mine[0].planned.label or "measured", line=True
        )
        charts.spreads(efficiency, ranks, _spreads(found, ranks), at, "", line=True)
    charts.plain(speed, "both", "speed-up, in FLOP/s")
    charts.plain(efficiency, "both", "efficiency of each rank")
    for axes in (speed, efficiency):
        charts.powers_of_two(axes, counts)
    speed.set_yscale("log", base=2)
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    speed.yaxis.set_minor_locator(NullLocator())
    efficiency.set_ylim(0, max(1.15, efficiency.get_ylim()[1]))
    efficiency.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for at, mine in enumerate(several.values()):
        _crosses(speed, [row for row in mine if not row.ok], at)
    lines, labels = speed.get_legend_handles_labels()
    if max(map(len, labels)) < 24:
        figure.legend(lines, labels, loc="outside right upper")
    else:
        speed.legend(lines, labels, loc="best", fontsize=8, frameon=True, framealpha=0.9, edgecolor=charts.FAINT)


def _crosses(axes: Any, rows: Sequence[Row], at: int) -> None:
    """What has no figures, at the lower edge."""
    for row in rows:
        colour, where = charts.look(at)["color"], axes.get_xaxis_transform()
        name = f"{row.planned.name}: {row.line['status']}"
        axes.plot([row.ranks], [0.02 + 0.05 * at], marker="x", color=colour, linestyle="none", transform=where,
                  label=name, clip_on=False, markeredgewidth=1.8)  # fmt: skip


@dataclass(frozen=True)
class _Spread:
    median: float
    low: float
    high: float


def _spreads(rows: Sequence[Row], over: Sequence[int]) -> list[_Spread]:
    found = []
    for row, ranks in zip(rows, over):
        assert row.speed_up is not None
        assert row.speed_up_quartiles is not None
        low, high = row.speed_up_quartiles
        found.append(_Spread(row.speed_up / ranks, min(low, row.speed_up) / ranks, max(high, row.speed_up) / ranks))
    return found


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


def _bars(figure: Figure, rows: Sequence[Row]) -> tuple[Any, list[tuple[Row, float]]]:
    """Axes with the names of all rows; the rows that have figures, with their heights."""
    listed, places, names = _places(rows)
    axes = figure.subplots()
    axes.set_yticks(places, names)
    axes.set_ylim(places[-1] + 0.65, -0.65)
    axes.tick_params(axis="y", length=0)
    charts.plain(axes, "x")
    for row, y in zip(listed, places):
        if not row.ok:
            axes.text(0.008, y, row.line["status"], va="center", fontsize=8, transform=axes.get_yaxis_transform(),
                      color=charts.WRONG if row.line["status"] == "failed" else charts.GREY)  # fmt: skip
    return axes, [(row, y) for row, y in zip(listed, places) if row.ok]


def _time(figure: Figure, rows: Sequence[Row]) -> None:
    axes, listed = _bars(figure, rows)
    longest = max(row.line["seconds"] for row, _ in listed)
    unit, scale = next((one for one in (("s", 1.0), ("ms", 1e3)) if longest * one[1] >= 1), ("µs", 1e6))
    right = max(row.line["quartiles"][1] for row, _ in listed) * scale
    rate = rate_unit(rows).replace("\n", " ")
    for row, y in listed:
        line = row.line
        whole, communicating = line["seconds"] * scale, (line["communicating"] or 0.0) * scale
        axes.barh(y, whole - communicating, 0.72, color=_COMPUTING)
        axes.barh(y, communicating, 0.72, left=whole - communicating, color=_COMMUNICATING)
        low, high = (value * scale for value in line["quartiles"])
        axes.plot([low, high], [y, y], color=charts.INK, linewidth=1.1, solid_capstyle="butt")
        for edge in (low, high):
            axes.plot([edge, edge], [y - 0.13, y + 0.13], color=charts.INK, linewidth=1.1)
        said = f"{seconds(line['seconds'])}, {line['tokens_per_second']:,.0f} {rate}"
        axes.text(max(whole, high) + right * 0.012, y, said, va="center", fontsize=8, color=charts.INK)
    axes.set_xlim(0, right * 1.3)
    axes.set_xlabel(f"time of a step, {unit}")
    whole = any(row.line["communicating"] is None for row, _ in listed)
    legend = [
        Patch(color=_COMPUTING, label="the whole step" if whole else "computing"),
        Patch(color=_COMMUNICATING, label="communicating, or waiting for others"),
    ]
    figure.legend(handles=legend[: 1 if whole else 2], loc="outside upper right", ncols=2)


def _bytes(figure: Figure, rows: Sequence[Row]) -> None:
    axes, listed = _bars(figure, rows)
    most = max(max(row.line["bytes_predicted"] + row.line["bytes_traced"]) for row, _ in listed)
    scale, unit = next(
        ((scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= scale), (1.0, "B")
    )
    used: set[str] = set()
    for row, y in listed:
        for what, offset, alpha in (("predicted_of_most", -0.2, 0.45), ("traced_of_most", 0.2, 1.0)):
            left = 0.0
            for name, count in row.line[what].items():
                operation = name.partition(" over ")[0]
                operation = operation if operation in charts.OPERATIONS else "other"
                used.add(operation)
                axes.barh(y + offset, count / scale, 0.38, left=left, color=charts.OPERATIONS[operation], alpha=alpha,
                          edgecolor="white", linewidth=0.4)  # fmt: skip
                left += count / scale
            word = what.partition("_")[0]
            count = sum(row.line[what].values())
            axes.text(left + most / scale * 0.008, y + offset, f"{format_si(count, 'B')} {word}", va="center",
                      fontsize=6.8, color=charts.INK if word == "traced" else charts.GREY)  # fmt: skip
    axes.set_xlim(0, max(most / scale, 1e-9) * 1.2)
    axes.set_xlabel(f"{unit} that the rank which sends most sends in a step")
    handles = [Patch(color=colour, label=name) for name, colour in charts.OPERATIONS.items() if name in used]
    if handles:
        figure.legend(handles=handles, loc="outside upper right", ncols=4)
