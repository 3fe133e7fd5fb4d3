"""Charts of measurements in one style: colours, axes, units as people write them; the same numbers, the same file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

INK, GREY, FAINT, WRONG = "#1a1a1a", "#5c5c5c", "#dddddd", "#CC3311"
# Paul Tol's bright palette; markers differ too, so that series are distinct without colours.
SERIES = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#222222")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
OPERATIONS = {"all-gather": "#44BB99", "reduce-scatter": "#EEDD88", "all-reduce": "#EE8866", "other": "#FFAABB"}
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "shardgrad", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.linewidth": 0.7, "legend.frameon": False,
    "legend.fontsize": 8.5,
}  # fmt: skip
_DPI = 160


@contextmanager
def chart(path: Path, title: str, size: tuple[float, float], note: str = "") -> Iterator[Figure]:
    """A figure to draw on, written to a .svg, .png or .pdf at the end.

    size: width and height in inches. note: below, in small letters: where and how it was measured.
    """
    with rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color=GREY)
        yield figure
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
        figure.savefig(path, dpi=_DPI, metadata=undated)


def look(at: int) -> dict[str, Any]:
    """Colour and marker of the series of this number."""
    return {"color": SERIES[at % len(SERIES)], "marker": MARKERS[at % len(MARKERS)], "markersize": 5.5}


def plain(axes: Any, grid: str, title: str = "") -> None:
    """No frame, a faint grid along "x", "y" or "both", a title to the left."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=9)


def spreads(axes: Any, at: Sequence[float], values: Iterable[Any], number: int, label: str, *, line: bool) -> None:
    """A series of medians with what they lie between; values: each with median, low and high."""
    found = list(values)
    middles = [one.median for one in found]
    ends = [[one.median - one.low for one in found], [one.high - one.median for one in found]]
    more: dict[str, Any] = {"linewidth": 1.6} if line else {"linestyle": "none"}
    axes.errorbar(at, middles, ends, label=label, capsize=2.5, elinewidth=1, **look(number), **more)


def line_at(axes: Any, value: float) -> None:
    """What the others are compared with."""
    axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (5, 3)), zorder=1)


def ratios(axes: Any, values: Iterable[float]) -> None:
    """A vertical axis of "times as much": 1×, 1.5×, 2×; logarithmic where the values differ by more than three."""
    found = [*values, 1.0]
    low, high = min(found), max(found)
    if high > 3 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, (1.0, 1.5, 2.0, 3.0, 5.0) if high < 20 * low else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))


def seconds(axes: Any) -> None:
    """A logarithmic vertical axis of seconds: 10 µs, 100 µs, 1 ms."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(EngFormatter(unit="s", sep=" "))
    axes.yaxis.set_minor_locator(NullLocator())


def counts(axis: Any) -> None:
    """Whole numbers with commas."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def powers_of_two(axes: Any, numbers: Sequence[int]) -> None:
    """A horizontal axis of numbers of ranks."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(numbers)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("ranks")


def legend_of(figure: Figure, axes: Any) -> None:
    """One legend for all panels, right of them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
