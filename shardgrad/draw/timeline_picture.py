"""A step as a picture: for each rank what its thread does, and below it the collectives that travel meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from shardgrad.charts import OPERATIONS
from shardgrad.draw.paper import FAINT, GREY, INK, PAPER, Paper, extent
from shardgrad.draw.timeline import Lane, Pair, Span, summary, union, without
from shardgrad.files import PICTURES

_WIDTH = 10.0  # inches of the whole step
_BAR, _TRAVEL, _RANK = 0.3, 0.28, 0.42  # heights: of the thread's lane, of the collectives', between ranks
_PRODUCT, _OPERATION, _START, _WAIT = "#77AADD", "#DDDDDD", "#AA4499", "#CC3311"


def draw(lanes: Sequence[Lane], title: str, path: Path) -> None:
    """Draw the step of every rank, to a .svg, .png or .pdf.

    Raises:
        ValueError: another ending.
    """
    if path.suffix not in PICTURES:
        raise ValueError(f"a picture ends in {', '.join(PICTURES)}, not {path.name!r}")
    picture(lanes, title).save(path)


def picture(lanes: Sequence[Lane], title: str) -> Paper:
    """The whole picture."""
    paper = Paper()
    paper.text(0, 0.1, title, 11, bold=True)
    left, top = 0.75, 0.75
    first, last = min(lane.start for lane in lanes), max(lane.end for lane in lanes)
    scale = _WIDTH / max(last - first, 1e-9)

    def at(time: float) -> float:
        return left + (time - first) * scale

    y = top
    for lane in lanes:
        _phases(paper, lane, at, y - 0.12)
        summed = summary(lane)
        paper.text(left - 0.12, y + _BAR / 2, f"rank {lane.rank}", 8, align="right", bold=True)
        paper.text(left - 0.12, y + _BAR + 0.06 + _TRAVEL / 2, "collectives", 7, align="right", ink=GREY)
        _thread(paper, lane, at, y, scale)
        _travels(paper, lane, at, y + _BAR + 0.06, scale)
        share = f"waits {summed.waiting:.1f} ms of {summed.step:.1f};  hidden {summed.hidden:.1f} ms of "
        paper.text(
            at(last),
            y + _BAR + 0.06 + _TRAVEL + 0.11,
            f"{share}{summed.travelling:.1f} travelling",
            7,
            align="right",
            ink=GREY,
        )
        y += _BAR + 0.06 + _TRAVEL + _RANK + 0.12
    _axis(paper, at, first, last, y - 0.22)
    _legend(paper, left, y + 0.42)
    return paper


def _phases(paper: Paper, lane: Lane, at: Callable[[float], float], y: float) -> None:
    for span in lane.spans:
        if span.kind == "phase":
            low, high = at(span.start), at(span.end)
            paper.line([(low, y - 0.03), (low, y + 0.03)], GREY)
            paper.line([(low, y), (high, y)], GREY)
            paper.line([(high, y - 0.03), (high, y + 0.03)], GREY)
            if extent(span.name, 7)[0] < high - low:
                paper.text((low + high) / 2, y - 0.08, span.name, 7, align="center", ink=GREY)


def _thread(paper: Paper, lane: Lane, at: Callable[[float], float], y: float, scale: float) -> None:
    """What the rank's own thread does; where nothing is drawn, it is in Python."""
    products, waits = lane.pairs("product"), lane.pairs("wait")
    other = without(lane.pairs("operation"), union([*products, *waits, *lane.pairs("start")]))
    paper.rectangle(at(lane.start), y, (lane.end - lane.start) * scale, _BAR, [PAPER], edge=FAINT)
    starts = without(lane.pairs("start"), waits)
    shown = ((other, [_OPERATION]), (starts, [_START]), (products, [_PRODUCT]), (waits, [_WAIT, PAPER]))
    for pairs, fills in shown:
        for start, end in _seen(pairs, scale):
            wide = (end - start) * scale
            paper.rectangle(at(start), y, wide, _BAR, fills if wide > 0.06 else fills[:1], edge="none")


def _travels(paper: Paper, lane: Lane, at: Callable[[float], float], y: float, scale: float) -> None:
    """Each collective under way; those that travel at one time, one above the other."""
    paper.rectangle(at(lane.start), y, (lane.end - lane.start) * scale, _TRAVEL, [PAPER], edge=FAINT)
    placed = _rows([span for span in lane.spans if span.kind == "travel"])
    height = _TRAVEL / max((row + 1 for _, row in placed), default=1)
    for span, row in placed:
        operation = span.name.split()[0]
        low, wide, top = at(span.start), (span.end - span.start) * scale, y + row * height
        fill = OPERATIONS.get(operation, OPERATIONS["other"])
        paper.rectangle(low, top, wide, height, [fill], edge=INK if wide > 0.03 else "none")
        head = span.name.partition(" over ")[0]
        for label in (span.name, head, head.removeprefix(operation).strip()):
            if label and height > 0.1 and extent(label, 6)[0] < wide - 0.06:
                paper.text(low + wide / 2, top + height / 2, label, 6, align="center")
                break


def _rows(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """Each span with the first row that is free when it begins."""
    ends: list[float] = []
    placed = []
    for span in spans:
        row = next((at for at, end in enumerate(ends) if end <= span.start), len(ends))
        ends[row : row + 1] = [span.end]
        placed.append((span, row))
    return placed


def _seen(pairs: Sequence[Pair], scale: float) -> list[Pair]:
    """Intervals closer together than can be seen, joined, so that the file stays small; others as they are."""
    apart = 0.002 / scale
    return [(start, end - apart) for start, end in union((start, end + apart) for start, end in pairs)]


def _axis(paper: Paper, at: Callable[[float], float], first: float, last: float, y: float) -> None:
    paper.line([(at(first), y), (at(last), y)], INK)
    span = (last - first) / 1000
    raw = span / 8
    power = 10.0 ** len(str(int(raw))) / 10 if raw >= 1 else 0.1
    tick = next((power * one for one in (1, 2, 5, 10) if power * one >= raw), power * 10)
    for number in range(int(span / tick) + 1):
        x = at(first + number * tick * 1000)
        paper.line([(x, y), (x, y + 0.05)], INK)
        paper.text(x, y + 0.13, f"{number * tick:g}", 7, align="center")
    paper.text(at(first), y + 0.3, "milliseconds", 7, ink=GREY)


def _legend(paper: Paper, x: float, y: float) -> None:
    signs = [
        ("products", [_PRODUCT]),
        ("other operations", [_OPERATION]),
        ("starting a collective", [_START]),
        ("waiting for one", [_WAIT, PAPER]),
        *((name.replace("other", "other collectives"), [fill]) for name, fill in OPERATIONS.items()),
    ]
    for name, fills in signs:
        paper.rectangle(x, y, 0.22, 0.14, fills)
        x += 0.28 + paper.text(x + 0.28, y + 0.07, name, 7) + 0.22
    paper.text(
        0.75,
        y + 0.3,
        "white: Python.  A collective is hidden where it travels while its rank does not wait.",
        7,
        ink=GREY,
    )
