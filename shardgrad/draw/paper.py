"""A sheet of paper measured in inches, from the top left; text is measured before it is set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import BoxStyle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.textpath import TextPath

from shardgrad.charts import GREY as GREY
from shardgrad.charts import INK as INK

FAINT, PAPER = "#d0d0d0", "#ffffff"
FONT, MONO = "DejaVu Sans", "DejaVu Sans Mono"  # both come with matplotlib
# Paul Tol's light palette: made for cells that are labelled, distinct to every kind of colour vision.
RANKS = ("#77AADD", "#EE8866", "#44BB99", "#EEDD88", "#FFAABB", "#99DDFF", "#AAAA00", "#BBCC33")
# Pictures must not depend on the user's matplotlibrc, nor on the day: the same layout gives the same file.
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "shardgrad",
    "svg.fonttype": "path",
    "font.family": FONT,
    "path.simplify": False,
}
_DPI = 200


def colour(rank: int) -> str:
    """The colour of a rank; with more than eight ranks they come round again, and numbers distinguish them."""
    return RANKS[rank % len(RANKS)]


@dataclass(frozen=True, slots=True)
class Text:
    x: float
    y: float  # of the line's middle
    text: str
    size: float
    align: str
    ink: str
    bold: bool
    mono: bool

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        width, height = extent(self.text, self.size, self.bold, self.mono)
        left = self.x - {"left": 0.0, "center": width / 2, "right": width}[self.align]
        return left, self.y - height / 2, left + width, self.y + height / 2


@cache
def extent(text: str, size: float, bold: bool = False, mono: bool = False) -> tuple[float, float]:
    """Width and height of a line of text, in inches."""
    if not text.strip():
        return 0.0, size / 72
    path = TextPath((0, 0), text, size=size, prop=_font(size, bold, mono))
    return float(path.get_extents().x1) / 72, size * 1.05 / 72


def _font(size: float, bold: bool, mono: bool) -> FontProperties:
    return FontProperties(family=MONO if mono else FONT, size=size, weight="bold" if bold else "normal")


@dataclass
class Paper:
    """What is to be drawn, in order; `save` draws it. `put` sets one paper on another."""

    patches: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    right: float = 0.0
    bottom: float = 0.0

    def _reach(self, x: float, y: float) -> None:
        self.right, self.bottom = max(self.right, x), max(self.bottom, y)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 8,
        *,
        align: str = "left",
        ink: str = INK,
        bold: bool = False,
        mono: bool = False,
    ) -> float:
        """A line of text whose middle is at y; returns its width."""
        if not text:
            return 0.0
        made = Text(x, y, text, size, align, ink, bold, mono)
        self.texts.append(made)
        left, _, right, low = made.box
        self._reach(right, low)
        return right - left

    def rectangle(self, x: float, y: float, w: float, h: float, fills: Sequence[str], edge: str = INK) -> None:
        """A rectangle of one colour, or in diagonal stripes of several."""
        self.patches.append(("stripes", (x, y, w, h, tuple(fills)), {"edge": edge}))
        self._reach(x + w, y + h)

    def pill(self, x: float, y: float, w: float, h: float) -> None:
        """A quiet ground for letters."""
        self.patches.append(("pill", ((x, y), (x + w, y + h)), {}))

    def line(self, points: Sequence[tuple[float, float]], ink: str = INK, width: float = 0.8) -> None:
        self.patches.append(("line", tuple(points), {"ink": ink, "width": width}))
        for x, y in points:
            self._reach(x, y)

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.patches.append(("arrow", ((x, y), (to_x, to_y)), {"ink": INK}))
        self._reach(max(x, to_x), max(y, to_y))

    def put(self, other: Paper, x: float, y: float) -> None:
        """All of another paper, its top left corner at (x, y)."""
        for kind, where, style in other.patches:
            if kind == "stripes":
                left, top, w, h, fills = where
                self.patches.append((kind, (left + x, top + y, w, h, fills), style))
            else:
                self.patches.append((kind, tuple((px + x, py + y) for px, py in where), style))
        for t in other.texts:
            self.texts.append(Text(t.x + x, t.y + y, t.text, t.size, t.align, t.ink, t.bold, t.mono))
        self._reach(other.right + x, other.bottom + y)

    def figure(self) -> Figure:
        """As a matplotlib figure of exactly this size."""
        margin = 0.15
        width, height = self.right + 2 * margin, self.bottom + 2 * margin
        figure = Figure(figsize=(width, height), facecolor=PAPER)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-margin, width - margin)
        axes.set_ylim(height - margin, -margin)
        axes.axis("off")
        for kind, where, style in self.patches:
            if kind == "stripes":
                _stripes(axes, *where, **style)
            elif kind == "pill":
                (left, top), (right, low) = where
                shape = BoxStyle("round", pad=0, rounding_size=0.04)
                ground: dict[str, Any] = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85}
                axes.add_patch(FancyBboxPatch((left, top), right - left, low - top, boxstyle=shape, **ground))
            elif kind == "line":
                axes.plot(*zip(*where), color=style["ink"], linewidth=style["width"], solid_capstyle="round")
            else:
                axes.add_patch(
                    FancyArrowPatch(
                        *where,
                        arrowstyle="-|>,head_length=4,head_width=2.2",
                        color=style["ink"],
                        linewidth=1.1,
                        shrinkA=0,
                        shrinkB=0,
                    )
                )
        for t in self.texts:
            align: dict[str, Any] = {"horizontalalignment": t.align, "verticalalignment": "center_baseline"}
            axes.text(t.x, t.y, t.text, fontproperties=_font(t.size, t.bold, t.mono), color=t.ink, **align)
        return figure

    def save(self, path: Path) -> None:
        """Write a .svg, .png or .pdf, by the name's ending; the same picture gives the same bytes."""
        metadata: dict[str, Any] = {"Creator": "shardgrad"}
        if path.suffix == ".svg":
            metadata["Date"] = None
        elif path.suffix == ".pdf":
            metadata["CreationDate"] = None
        else:
            metadata = {"Software": "shardgrad"}
        with rc_context(_SETTINGS):
            self.figure().savefig(path, dpi=_DPI, metadata=metadata)


_STRIPE = 0.09  # inches, measured across


def _stripes(axes: Any, x: float, y: float, w: float, h: float, fills: Sequence[str], edge: str) -> None:
    box: dict[str, Any] = {"linewidth": 0.7, "joinstyle": "miter"}
    if len(fills) == 1:
        axes.add_patch(Rectangle((x, y), w, h, facecolor=fills[0], edgecolor=edge, **box))
        return
    # Bands of x + y, as wide as lets each colour be seen at least once.
    step = min(_STRIPE * 2**0.5, (w + h) / len(fills))
    at, low = 0, x + y
    while low < x + y + w + h - 1e-9:
        band = _band(x, y, w, h, low, low + step)
        if len(band) > 2:
            axes.add_patch(Polygon(band, closed=True, facecolor=fills[at % len(fills)], edgecolor="none"))
        at, low = at + 1, low + step
    axes.add_patch(Rectangle((x, y), w, h, facecolor="none", edgecolor=edge, **box))


def _band(x: float, y: float, w: float, h: float, low: float, high: float) -> list[tuple[float, float]]:
    """The part of a rectangle in which low ≤ x + y ≤ high."""
    points = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
    for sign, bound in ((1.0, low), (-1.0, high)):
        kept: list[tuple[float, float]] = []
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1]):
            a, b = sign * (ax + ay - bound), sign * (bx + by - bound)
            if a >= 0:
                kept.append((ax, ay))
            if (a < 0) != (b < 0):
                t = a / (a - b)
                kept.append((ax + t * (bx - ax), ay + t * (by - ay)))
        points = kept
        if not points:
            break
    return points
