"""What layouts send, over the least that any could send with one P-th of every tensor on each rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardgrad.layout.layout import Layout
from shardgrad.layout.lower_bound import best_grid, least_words
from shardgrad.layout.presets import PRESETS

PHASES = ("forward", "dX", "dW")


@dataclass(frozen=True, slots=True)
class Row:
    """One layout on one grid, for one set of sizes n, d, m.

    words: elements that the first rank sends for Y, dX and dW. stored: elements of X, W and Y that it holds, over one
    P-th of all. least: the bound on what each of the three products sends.
    """

    layout: str
    n: int
    d: int
    m: int
    ranks: int
    grid: dict[str, int]
    words: dict[str, int]
    stored: float
    least: float

    @property
    def ratios(self) -> dict[str, float] | None:
        """Words over the bound; None where the layout stores more than one P-th, of which the bound does not speak."""
        if self.stored > 1 + 1e-9 or not self.least:
            return None
        return {phase: self.words[phase] / self.least for phase in PHASES}


def row(name: str, sizes: tuple[int, int, int], grid: dict[str, int]) -> Row:
    """What a preset sends, on the grid of its axes."""
    layout: Layout = PRESETS[name]
    known = dict(zip(("n", "d", "m"), sizes))
    words = dict.fromkeys(PHASES, 0)
    for one in layout.collectives(known, grid, "float32"):
        words[one.phase] += one.bytes // 4
    ranks = prod(grid.values())
    held = total = 0
    resolved = layout.resolve(known, grid, dict.fromkeys(grid, 0))
    for spec in (layout.lhs, layout.rhs, layout.out):
        held += prod(resolved.shape_of(spec.dims))
        total += prod(known[letter] for letter in spec.letters)
    n, d, m = sizes
    return Row(name, n, d, m, ranks, grid, words, held * ranks / total, least_words(n, d, m, ranks))


def rows(sizes: Iterable[tuple[int, int, int]], ranks: Iterable[int]) -> list[Row]:
    """One-dimensional presets, the 2D one on a square grid where there is one, and the 3D one on its best grid."""
    made = []
    counts = list(ranks)
    for at in sizes:
        for count in counts:
            for name in ("column", "row", "data", "column_sequence", "row_sequence", "fully_sharded"):
                made.append(row(name, at, {PRESETS[name].axes[0]: count}))
            side = round(count**0.5)
            if side * side == count:
                made.append(row("2d", at, {"r": side, "c": side}))
            made.append(row("3d", at, dict(zip("abc", best_grid(*at, count)))))
    return made


def draw(rows: Iterable[Row], path: Path) -> None:
    """Y, dX and dW together over three times the bound, by the number of ranks: a panel for each set of sizes."""
    from shardgrad import charts  # matplotlib takes its time

    listed = [one for one in rows if one.least]
    sizes = list(dict.fromkeys((one.n, one.d, one.m) for one in listed))
    title, note = "Elements that a rank sends, over the least", "Y, dX and dW together over three times the lower bound"
    with charts.chart(path, title, (2.2 + 3.4 * len(sizes), 4.0), note) as figure:
        axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for panel, (n, d, m) in zip(axes, sizes):
            here = [one for one in listed if (one.n, one.d, one.m) == (n, d, m)]
            charts.line_at(panel, 1)
            for at, name in enumerate(dict.fromkeys(one.layout for one in here)):
                mine = [one for one in here if one.layout == name]
                replicates = any(one.ratios is None for one in mine)
                panel.plot(
                    [one.ranks for one in mine],
                    [_over(one) for one in mine],
                    linestyle=":" if replicates else "-",
                    label=f"{name} (replicates)" if replicates else name,
                    **charts.look(at),
                    markerfacecolor="none",
                )
            charts.powers_of_two(panel, sorted({one.ranks for one in here}))
            charts.plain(panel, "y", f"n = {n:,}, d = {d:,}, m = {m:,}")
            charts.ratios(panel, map(_over, listed))
        charts.legend_of(figure, axes[0])


def _over(row: Row) -> float:
    return sum(row.words.values()) / (3 * row.least)
