"""The pictures of a run's page, from its metrics; each is an SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Lines = Sequence[dict[str, Any]]
BLUE, RED, GREY = "#3b6ea5", "#b5432a", "#8a8f98"
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#333a44",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#333a44",
    "ytick.color": "#333a44",
    "grid.color": "#e3e6ea",
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "shardgrad",  # the same picture has the same bytes
}


def _picture(draw: Callable[[Figure], None], height: float) -> str:
    from matplotlib import rc_context  # takes a second, which the ranks that draw nothing need not
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(5.4, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def losses(train: Lines, held_out: Lines, unit: str, begun: Sequence[int]) -> str:
    """Training and held-out loss by step; begun: steps at which the run went on after an end."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, step in enumerate(begun):
            axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":", label="went on" if not number else None)
        axes.plot(*_points(train, "loss"), linewidth=1.2, color=BLUE, label="training")
        axes.plot(*_points(held_out, "loss"), linewidth=1.6, marker="o", markersize=3.5, color=RED, label="held out")
        axes.set(title="Loss", xlabel="step", ylabel=f"nats a {unit}")
        axes.legend()

    return _picture(draw, 2.9)


def speed(train: Lines, begun: Sequence[int]) -> str:
    """Tokens a second, and the share of the time spent communicating, by step."""

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
        for axes in (above, below):
            for step in begun:
                axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
        above.plot(*_points(train, "tokens_per_second"), linewidth=1.2, color=BLUE)
        above.set(title="Speed", ylabel="tokens/s")
        above.set_ylim(bottom=0)
        above.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        steps, shares = _points(train, "communication_share")
        below.fill_between(steps, [100 * share for share in shares], color=GREY, alpha=0.35, linewidth=0)
        below.plot(steps, [100 * share for share in shares], linewidth=1, color=GREY)
        below.set(xlabel="step", ylabel="% comm.", ylim=(0, 100))

    return _picture(draw, 2.9)


def rounding(shares: Sequence[float]) -> str:
    """The first step's loss and gradients, each with how much of what rounding may do it uses; worst first."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        shown = [max(share, 1e-3) if isfinite(share) else 1e3 for share in shares]
        colours = [BLUE if share <= 1 else RED for share in shares]
        axes.scatter(range(1, len(shown) + 1), shown, s=12, c=colours, linewidths=0)
        axes.axhline(1, color=RED, linewidth=1, linestyle="--")
        axes.text(0.99, 1.1, "allowed", transform=axes.get_yaxis_transform(), color=RED, ha="right")
        axes.set_yscale("log")
        axes.set_ylim(min(0.01, *shown), max(3, 2 * max(shown)))
        axes.set(title="First step against one device", xlabel="loss and gradients, worst first")
        axes.set_ylabel("of what rounding may do")

    return _picture(draw, 2.5)


def traffic(rows: Sequence[Sequence[Any]]) -> str:
    """Bytes that rank 0 sends in a step. rows: operation, axis, count, bytes."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        ordered = sorted(rows, key=lambda row: row[3])
        most = max((row[3] for row in ordered), default=0)
        scale, prefix = next((s for s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if most >= s[0]), (1, ""))
        sizes = [row[3] / scale for row in ordered]
        bars = axes.barh([f"{row[0]}\non {row[1]}" for row in ordered], sizes, color=BLUE, height=0.6)
        labels = [f"{size:,.3g} {prefix}B in {row[2]} calls" for size, row in zip(sizes, ordered)]
        axes.bar_label(bars, labels, padding=3, color="#333a44")
        axes.set_xlim(right=1.5 * max(sizes, default=1) or 1)
        axes.set(title="Sent by rank 0 in a step", xlabel=f"{prefix}B")
        axes.grid(visible=False, axis="y")

    return _picture(draw, 2.5)


def _points(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [line[key] for line in lines]
