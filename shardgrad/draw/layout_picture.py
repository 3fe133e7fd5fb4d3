"""A layout as a picture: forward and backward side by side, each product in a corner whose edges meet.

    forward         W stored
                      ↓ all-gather
        X stored    W gathered
          ↓
        X gathered  Y  (partial sums: a stack of terms)
                      ↓ reduce-scatter
                    Y stored

Rows of the left operand and of the result lie side by side, as do columns of the upper operand and of the result: what
is sharded alike has the same colours side by side, and what is not must travel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardgrad.draw import blocks
from shardgrad.draw.blocks import Block, Rulers, Sheet
from shardgrad.draw.paper import FAINT, GREY, Paper, colour, extent
from shardgrad.errors import LayoutError
from shardgrad.files import PICTURES
from shardgrad.layout import idle
from shardgrad.layout.plan import Dims
from shardgrad.layout.sizes import rule
from shardgrad.layout.steps import Moved, Step, TensorFlow, Timeline
from shardgrad.layout.units import format_si

MOST_RANKS = 64
_LONG, _SHORT, _STRIP = 1.2, 0.66, 0.22  # inches of an edge: the longest letter's, the shortest's, one that is missing
_PART = 0.19  # the least width of a part with an owner of its own
_DEPTH = 0.84  # of a stack of sheets, at most
_LINE = 0.135
_SPACE = 0.5  # between panels
_ARROW = 0.32  # from a matrix's left edge to what is written beside an arrow
_SIGMA = re.compile(r"(Σ)_(\S+) ")
_LOCAL = {"slice": "keep own part of"}


def draw(timeline: Timeline, path: Path) -> None:
    """Draw a layout on its mesh, to a .svg, .png or .pdf.

    Raises:
        LayoutError: more ranks than can be distinguished, or an ending that is no picture's.
    """
    if path.suffix not in PICTURES:
        raise LayoutError(f"a picture ends in {', '.join(PICTURES)}, not {path.name!r}")
    picture(timeline).save(path)


def picture(timeline: Timeline) -> Paper:
    """The whole picture: heading, a panel for each phase, the mesh, what the signs mean.

    Raises:
        LayoutError: more ranks than can be distinguished.
    """
    if len(timeline.ranks) > MOST_RANKS:
        raise LayoutError(
            f"a picture has room for {MOST_RANKS} ranks, not {len(timeline.ranks)}: draw the layout on a smaller mesh, "
            f"as {','.join(f'{axis}=2' for axis in timeline.layout.axes)}; what is communicated stays the same"
        )
    paper = Paper()
    paper.text(0, 0.1, str(timeline.layout), 11, bold=True, mono=True)
    sizes = ", ".join(f"{letter} = {size}" for letter, size in timeline.sizes.items())
    mesh = ", ".join(
        f"{axis} = {size}{' (balanced)' if rule(size) == 'balanced' else ''}" for axis, size in timeline.mesh.items()
    )
    paper.text(0, 0.32, f"{sizes};  mesh {mesh};  {timeline.dtype}", 8, ink=GREY)
    panels = [_Panel(timeline, step) for step in timeline.steps]
    above = max(panel.above for panel in panels)
    x, top, between = 0.0, 0.55, []
    for panel in panels:
        paper.put(panel.drawn(above), x, top)
        between.append(x + panel.width + _SPACE / 2)
        x += panel.width + _SPACE
    for x in between[:-1]:
        paper.line([(x, top), (x, paper.bottom)], ink=FAINT, width=0.6)
    _footer(paper, timeline, panels, paper.bottom + 0.3)
    return paper


@dataclass
class _Matrix:
    """A tensor as some ranks hold it, ready to be set down."""

    name: str
    note: str
    sheets: tuple[Sheet, ...]
    across: tuple[str, str]
    down: tuple[str, str]
    width: float
    height: float

    @property
    def offset(self) -> float:
        batched = any(sheet.batch for sheet in self.sheets)
        return min(0.15 if batched else 0.12, _DEPTH / max(1, len(self.sheets) - 1))

    @property
    def depth(self) -> float:
        return self.offset * max(0, len(self.sheets) - 1)

    @property
    def left(self) -> float:
        """Room for what is written at the left edge."""
        return max(extent(self.down[0], 8)[0], extent(self.down[1], 6.5)[0]) + 0.08

    @property
    def above(self) -> float:
        """Room for the name, what is written at the upper edge, and the sheets behind."""
        return 0.2 + (0.17 if self.across[0] else 0.04) + self.depth

    @property
    def right(self) -> float:
        """From the left edge of the front sheet to the end of everything."""
        title = extent(self.name, 9, bold=True)[0] + 0.08 + extent(self.note, 7)[0]
        across = extent(self.across[0], 8)[0] + 0.07 + extent(self.across[1], 6.5)[0]
        return max(self.width + self.depth, title, across)

    def draw(self, paper: Paper, x: float, y: float) -> None:
        """The upper left corner of the front sheet at (x, y)."""
        at = y - self.above + 0.08
        width = paper.text(x, at, self.name, 9, bold=True)
        paper.text(x + width + 0.07, at + 0.005, self.note, 7, ink=GREY)
        if self.across[0]:
            width = paper.text(x, at + 0.17, self.across[0], 8)
            paper.text(x + width + 0.07, at + 0.175, self.across[1], 6.5, ink=GREY)
        if self.down[0]:
            middle = y + self.height / 2
            paper.text(x - 0.06, middle - 0.07, self.down[0], 8, align="right")
            paper.text(x - 0.06, middle + 0.07, self.down[1], 6.5, align="right", ink=GREY)
        for back in range(len(self.sheets) - 1, -1, -1):
            shift = back * self.offset
            self._sheet(paper, self.sheets[back], back, x + shift, y - shift)

    def _sheet(self, paper: Paper, sheet: Sheet, back: int, x: float, y: float) -> None:
        for block in sheet.blocks:
            for left, top, w, h in block.rectangles:
                box = (x + left * self.width, y + top * self.height, w * self.width, h * self.height)
                paper.rectangle(*box, [colour(rank) for rank in block.ranks])
                if back == 0:
                    _label(paper, box, block)
        if back == 0:
            return
        if sheet.term and self.offset >= 0.1:
            paper.text(x + self.width - self.offset / 2, y + self.offset / 2, "+", 7, align="center")
        elif not sheet.term and len(sheet.blocks) == 1 and self.offset >= 0.1:
            paper.text(x + 0.05, y + self.offset / 2, sheet.blocks[0].label, 6.5)


def _label(paper: Paper, box: tuple[float, float, float, float], block: Block) -> None:
    """The ranks of a block, in the largest letters that fit, on several lines if need be; else left to the colours."""
    x, y, w, h = box
    label = block.label
    several = len(block.ranks) > 1
    choices = [(8.0, [f"ranks {label}"]), (7.0, [f"ranks {label}"])] if several and len(block.terms) == 1 else []
    choices += [(size, [label]) for size in (8.0, 7.0, 6.5)]
    choices += [(size, lines) for size in (8.0, 7.0, 6.0, 5.5) for lines in _broken(label)]
    for size, lines in choices:
        width = max(extent(line, size)[0] for line in lines)
        pitch = size * 1.25 / 72
        if width > w - 0.1 or len(lines) * pitch > h - 0.04:
            continue
        if several:  # stripes behind letters are hard on the eye
            half = len(lines) * pitch / 2
            paper.pill(x + w / 2 - width / 2 - 0.03, y + h / 2 - half, width + 0.06, 2 * half)
        for at, line in enumerate(lines):
            paper.text(x + w / 2, y + h / 2 + (at - (len(lines) - 1) / 2) * pitch, line, size, align="center")
        return


def _broken(text: str) -> Iterable[list[str]]:
    """Ways to set a list of ranks, in one line or in several of like length."""
    words = re.findall(r"\S+(?: \+(?= ))?", text)
    for count in range(1, min(4, len(words)) + 1):
        per = -(-len(words) // count)
        yield [" ".join(words[at : at + per]) for at in range(0, len(words), per)]


class _Panel:
    """One phase."""

    def __init__(self, timeline: Timeline, step: Step) -> None:
        self.timeline, self.step = timeline, step
        self.rulers = Rulers(timeline)
        layout = timeline.layout
        r, c, k = layout.rows, layout.contracted, layout.columns
        largest = max((prod(timeline.sizes[x] for x in group) for group in (r, c, k) if group), default=1)
        self.lengths = {group: self._length(group, largest) for group in (r, c, k)}
        reads = {read.role: read for read in step.reads}
        self.left: list[_Matrix] = []
        self.top: list[_Matrix] = []
        if step.made.role == "out":
            self.left = self._chain(reads["lhs"], r, c)
            self.top = self._chain(reads["rhs"], c, k)
            self.made = self._chain(step.made, r, k)
        elif step.made.role == "lhs":
            self.left = self._chain(reads["out"], r, k)
            self.top = self._chain(reads["rhs"], k, c)
            self.made = self._chain(step.made, r, c)
        elif step.made.role == "rhs":
            self.left = self._chain(reads["lhs"], c, r)
            self.top = self._chain(reads["out"], r, k)
            self.made = self._chain(step.made, c, k)
        else:
            self.top = self._chain(reads["out"], r, k)
            self.made = self._chain(step.made, r, k)
        self.left_moves = step.reads[0 if step.made.role != "rhs" else 1].moves if self.left else ()
        self.top_moves = step.reads[1 if step.made.role in ("out", "lhs") else 0].moves
        self.bias = self._chain(step.bias, r, k) if step.bias else []
        # From the panel's left to the left edges of the left operand and of the result.
        self.used_x = max((m.left for m in self.left), default=0.0)
        written = max((extent(_named(moved), 7)[0] for moved in self.left_moves), default=-_ARROW) + _ARROW
        beside = self.used_x + max([written, *(m.right for m in self.left)]) + 0.12 if self.left else 0.0
        self.corner = beside + max(m.left for m in (*self.top, *self.made, *self.bias))
        left, top = self._chain_height(self.left, self.left_moves), self._chain_height(self.top, self.top_moves)
        heading = 0.5
        self.above = heading + max(left, top + self.made[0].above + 0.1)
        self.width = max(self.drawn(self.above).right, extent(f"backward: {step.name}", 10, bold=True)[0])

    def _length(self, group: tuple[str, ...], largest: int) -> float:
        if not group:
            return _STRIP
        share = prod(self.timeline.sizes[letter] for letter in group) / max(1, largest)
        natural = max(_SHORT, _LONG * min(1.0, share))
        return min(2.6, max(natural, _PART * self.rulers.count(group)))

    def _chain(self, flow: TensorFlow, height: tuple[str, ...], width: tuple[str, ...]) -> list[_Matrix]:
        """The tensor before and, if it moves, after."""
        if not flow.moves:
            note = flow.note or self._partial(flow.partial_before)
            return [self._matrix(flow, flow.before, flow.partial_before, height, width, note)]
        gathered = not flow.partial_before
        before = "stored" if gathered else self._partial(flow.partial_before)
        after = "gathered" if gathered else self._partial(flow.partial_after) or "stored"
        if flow.role == "bias" and gathered:
            after = "as added"
        return [
            self._matrix(flow, flow.before, flow.partial_before, height, width, before),
            self._matrix(flow, flow.after, flow.partial_after, height, width, after),
        ]

    @staticmethod
    def _partial(axes: Sequence[str]) -> str:
        return f"partial over {', '.join(axes)}" if axes else ""

    def _matrix(
        self,
        flow: TensorFlow,
        dims: Dims,
        partial: Sequence[str],
        height: tuple[str, ...],
        width: tuple[str, ...],
        note: str,
    ) -> _Matrix:
        letters = {dim.letter for dim in dims}
        first = next((dim.letter for dim in dims if dim.letter in height or dim.letter in width), None)
        turned = first in width and any(letter in letters for letter in height)
        batched = tuple(dim for dim in dims if dim.letter not in height and dim.letter not in width)
        if batched:
            text, numbers = blocks.edge(
                batched, [dim.letter for dim in batched], self.timeline.sizes, self.timeline.mesh
            )
            note = f"{f'{note}, ' if note else ''}sheets {text} = {numbers}"
        sheets = blocks.sheets(self.rulers, dims, partial, height, width)
        if missing := blocks.none(sheets, len(self.timeline.ranks)):
            text = f"nothing on {'rank' if len(missing) == 1 else 'ranks'} {blocks.listed(missing)}"
            note = f"{note}, {text}" if note else text
        return _Matrix(
            flow.name + ("ᵀ" if turned else ""),
            note,
            sheets,
            self._edge(dims, width),
            self._edge(dims, height),
            self.lengths[width] if any(letter in letters for letter in width) else _STRIP,
            self.lengths[height] if any(letter in letters for letter in height) else _STRIP,
        )

    def _edge(self, dims: Dims, letters: tuple[str, ...]) -> tuple[str, str]:
        return blocks.edge(dims, letters, self.timeline.sizes, self.timeline.mesh)

    @staticmethod
    def _gap(moves: Sequence[Moved]) -> float:
        """Height of an arrow down, with what is written beside it."""
        return 2 * _LINE * len(moves) + 0.14

    def _chain_height(self, chain: Sequence[_Matrix], moves: Sequence[Moved]) -> float:
        """Of a tensor above what becomes of it; of the left operand, down to the upper edge of the last alone."""
        height = sum(matrix.above + matrix.height for matrix in chain)
        if chain is self.left and chain:
            height -= chain[-1].height
        return height + (self._gap(moves) if len(chain) > 1 else 0.0)

    def drawn(self, above: float) -> Paper:
        """The panel; `above` inches from its top to the upper edge of the result, so that panels line up."""
        paper = Paper()
        forward = self.step.made.role == "out"
        paper.text(0, 0.1, self.step.name if forward else f"backward: {self.step.name}", 10, bold=True)
        self._formula(paper, 0.29)
        x, y = self.corner, above
        rise = self._rise(self.top, self.top_moves, self.made[0].above + 0.1)
        self._down(paper, self.top, x, y - rise, self.top_moves)
        if self.left:
            rise = self._rise(self.left, self.left_moves, -self.left[-1].height)
            self._down(paper, self.left, self.used_x, y - rise, self.left_moves)
        bottom = self._down(paper, self.made, x, y, self.step.made.moves)
        if self.bias:
            paper.text(x, bottom + 0.18, "+", 10, bold=True)
            paper.text(x + 0.16, bottom + 0.19, "added once", 7, ink=GREY)
            moves = self.step.bias.moves if self.step.bias else ()
            self._down(paper, self.bias, x, bottom + 0.3 + self.bias[0].above, moves)
        return paper

    def _rise(self, chain: Sequence[_Matrix], moves: Sequence[Moved], below: float) -> float:
        """From the upper edge of a chain's first matrix down to `below` under its last."""
        rise = chain[-1].height + below
        return rise + (chain[0].height + self._gap(moves) + chain[1].above if len(chain) > 1 else 0.0)

    def _down(self, paper: Paper, chain: list[_Matrix], x: float, y: float, moves: Sequence[Moved]) -> float:
        """A tensor and, below, what becomes of it; returns where it ends."""
        chain[0].draw(paper, x, y)
        y += chain[0].height
        if len(chain) > 1:
            gap = self._gap(moves)
            self._arrow_down(paper, x + min(0.2, chain[0].width / 2), y, gap, moves)
            y += gap + chain[1].above
            chain[1].draw(paper, x, y)
            y += chain[1].height
        return y

    def _arrow_down(self, paper: Paper, x: float, y: float, gap: float, moves: Sequence[Moved]) -> None:
        paper.arrow(x, y + 0.05, x, y + gap - 0.02)
        at = y + 0.07 + _LINE / 2
        for moved in moves:
            paper.text(x + 0.12, at, _named(moved), 7)
            paper.text(x + 0.12, at + _LINE, _bytes(moved), 6.5, ink=GREY)
            at += 2 * _LINE

    def _formula(self, paper: Paper, y: float) -> None:
        """The local product, the letters of the sum set small and low."""
        x, at, text = 0.0, 0, self.step.formula
        for sigma in _SIGMA.finditer(text):
            x += paper.text(x, y, text[at : sigma.start()].rstrip(), 8, ink=GREY) + 0.05
            x += paper.text(x, y, "Σ", 8, ink=GREY) + 0.01
            x += paper.text(x, y + 0.035, sigma[2], 6, ink=GREY) + 0.05
            at = sigma.end()
        paper.text(x, y, text[at:], 8, ink=GREY)


def _named(moved: Moved) -> str:
    kind = moved.move.kind
    return f"{_LOCAL.get(kind, kind)} {moved.tensor} over {moved.move.axis}"


def _bytes(moved: Moved) -> str:
    if moved.move.kind == "slice":
        return "no bytes"
    most = format_si(max(moved.bytes), "B")
    return most if len(set(moved.bytes)) == 1 else f"at most {most}"


def _footer(paper: Paper, timeline: Timeline, panels: Sequence[_Panel], y: float) -> None:
    """The mesh in the ranks' colours, what the signs mean, and what is sent in all."""
    end = _mesh(paper, timeline, y)
    x, at = end + 0.45, y + 0.06
    for line in [*_signs(panels), *idle.notes(timeline.layout, timeline.sizes, timeline.mesh)]:
        paper.text(x, at, line, 7)
        at += 0.16
    sums = []
    for step in timeline.steps:
        by_rank = [sum(moved.bytes[rank] for moved in step.moves) for rank in range(len(timeline.ranks))]
        sums.append((step.name, max(by_rank), len(set(by_rank)) > 1))
    text = ",  ".join(f"{name} {'at most ' if uneven else ''}{format_si(most, 'B')}" for name, most, uneven in sums)
    paper.text(x, at, f"bytes are what one rank sends;  in all:  {text}", 7)


def _signs(panels: Sequence[_Panel]) -> list[str]:
    matrices = [m for panel in panels for m in (*panel.left, *panel.top, *panel.made, *panel.bias)]
    every = [block for matrix in matrices for sheet in matrix.sheets for block in sheet.blocks]
    signs = ["a colour is a rank; what has its colour is what it holds"]
    if any(len(block.ranks) > 1 for block in every):
        signs.append("stripes: several ranks hold the same values")
    if any(sheet.term for matrix in matrices for sheet in matrix.sheets):
        signs.append("sheets with +: each rank holds one term of a sum")
    if any(sheet.batch for matrix in matrices for sheet in matrix.sheets):
        signs.append("sheets without +: parts of a letter that all three tensors carry")
    repeated = panels[0].rulers.repeated
    if repeated:
        signs.append(f"drawn once for every {', '.join(repeated)}: each is sharded alike")
    if any(_idle(panels[0].timeline)):
        signs.append("crossed out: computes nothing")
    return signs


def _idle(timeline: Timeline) -> list[bool]:
    """Of each rank, whether no phase gives it a product."""
    return [not any(step.flops[rank] for step in timeline.steps) for rank in range(len(timeline.ranks))]


def _mesh(paper: Paper, timeline: Timeline, y: float) -> float:
    """Ranks in their places: the last axis to the right, the one before it down, others side by side."""
    axes = [(axis, size) for axis, size in timeline.mesh.items()]
    across = axes[-1] if axes else ("", 1)
    down = axes[-2] if len(axes) > 1 else ("", 1)
    outer = axes[:-2]
    cell, idle_ranks = 0.26, _idle(timeline)
    paper.text(0, y + 0.02, "mesh", 9, bold=True)
    x, top = (0.08 + extent(down[0], 8)[0] if down[0] else 0.0), y + 0.45 + (0.16 if outer else 0.0)
    per = across[1] * down[1]
    per_row = 8 if across[1] <= 2 else 4
    start, right = x, x
    for number in range(len(timeline.ranks) // per):
        if number and number % per_row == 0:
            x, top = start, top + down[1] * cell + 0.62
        coordinate = timeline.ranks[number * per].coordinate
        label = ", ".join(f"{axis} {coordinate[axis]}" for axis, _ in outer)
        paper.text(x, top - 0.28, label, 7, ink=GREY)
        paper.text(x, top - 0.11, f"{across[0]} →" if across[0] else "", 8)
        if down[0]:
            paper.text(x - 0.06, top + cell / 2, f"{down[0]}", 8, align="right")
            paper.text(x - 0.06, top + cell / 2 + 0.15, "↓", 8, align="right")
        for at in range(per):
            rank = number * per + at
            box = (x + at % across[1] * cell, top + at // across[1] * cell, cell, cell)
            paper.rectangle(*box, [colour(rank)])
            for low, high in ((0.0, 0.3), (0.7, 1.0)) if idle_ranks[rank] else ():  # past the number
                paper.line([(box[0] + part * cell, box[1] + (1 - part) * cell) for part in (low, high)])
            paper.text(box[0] + cell / 2, box[1] + cell / 2, str(rank), 7, align="center")
        width = max(across[1] * cell, extent(label, 7)[0], extent(f"{across[0]} →", 8)[0])
        right = max(right, x + width)
        x += width + 0.25 + (extent(down[0], 8)[0] if down[0] else 0.0)
    return right
