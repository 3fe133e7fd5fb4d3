"""What the results of an experiment show side by side: rows for the table and the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardgrad.layout.units import Aligned, format_si
from shardgrad.scale import idle
from shardgrad.scale.config import Planned
from shardgrad.scale.results import Line

DISPENSABLE = ("quartiles", "effic.", "memory", "speed-up")  # where a table is too wide: all of it is in the pictures


@dataclass(frozen=True)
class Row:
    """A cell with its result.

    speed_up: work in a second over that of one rank, of the series' least ranks; efficiency: of each rank. Both count
    floating-point operations, so they mean the same where sizes grow. None where the series has one number of ranks.
    """

    planned: Planned
    line: Line
    speed_up: float | None = None
    speed_up_quartiles: tuple[float, float] | None = None

    @property
    def ok(self) -> bool:
        return self.line["status"] == "ok"

    @property
    def ranks(self) -> int:
        return self.planned.cell.world

    @property
    def efficiency(self) -> float | None:
        return None if self.speed_up is None else self.speed_up / self.ranks


def rows(planned: Sequence[Planned], lines: Sequence[Line]) -> list[Row]:
    """One row a cell, in order."""
    found = []
    for mine, line in zip(planned, lines):
        peers = [
            (other.cell.world, result)
            for other, result in zip(planned, lines)
            if other.series == mine.series and result["status"] == "ok"
        ]
        if line["status"] != "ok" or len({ranks for ranks, _ in peers}) < 2:
            found.append(Row(mine, line))
            continue
        ranks, base = min(peers, key=lambda peer: peer[0])
        rate = ranks * base["seconds"] / base["flops"] * line["flops"]  # of one rank: what a step's work would take
        low, high = line["quartiles"]
        found.append(Row(mine, line, rate / line["seconds"], (rate / high, rate / low)))
    return found


def columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The table, cells by heading (a name, and below it the unit); without columns that would be empty."""
    ok = [row.line for row in rows if row.ok]
    times = Aligned.of([line["seconds"] for line in ok], prefixes="mµ")
    bytes_sent = Aligned.of([max(line["bytes_traced"]) for line in ok])
    memory = Aligned.of([line["peak_memory"] or 0 for line in ok])

    def quartiles(row: Row) -> str:
        low, high = row.line["quartiles"]
        return f"{times.text(low)}–{times.text(high)}"

    def share(row: Row) -> str:
        talking = row.line["communicating"]
        return "" if talking is None else f"{talking / row.line['seconds']:.0%}"

    made: dict[str, Callable[[Row], str]] = {
        f"time\n{times.prefix}s": lambda row: times.text(row.line["seconds"]),
        f"quartiles\n{times.prefix}s": quartiles,
        "comm.": share,
        "speed-up": lambda row: "" if row.speed_up is None else f"{row.speed_up:.2f}",
        "effic.": lambda row: "" if row.efficiency is None else f"{row.efficiency:.0%}",
        rate_unit(rows): lambda row: f"{row.line['tokens_per_second']:,.0f}",
        f"sent\n{bytes_sent.prefix}B": lambda row: (
            bytes_sent.text(max(row.line["bytes_traced"])) + ("" if row.line["as_predicted"] else " !")
        ),
        f"memory\n{memory.prefix}B": lambda row: (
            "" if row.line["peak_memory"] is None else memory.text(row.line["peak_memory"])
        ),
    }
    filled = {name: [cell(row) if row.ok else "" for row in rows] for name, cell in made.items()}
    time = next(iter(filled))
    filled[time] = [text if row.ok else row.line["status"] for row, text in zip(rows, filled[time])]
    shown = {name: [text or "–" for text in found] for name, found in filled.items() if any(found) or name == time}
    return {"cell": [row.planned.name for row in rows], **shown}


def rate_unit(rows: Sequence[Row]) -> str:
    """What a second's rate counts: rows of a layer, tokens of what has a sequence."""
    layers = {row.planned.cell.kind == "layer" for row in rows}
    return "rows/s" if layers == {True} else "tokens/s" if layers == {False} else "rows/s or\ntokens/s"


def sent(by_rank: Sequence[int]) -> str:
    """Bytes that the rank which sends most sends in a step."""
    return format_si(max(by_rank), "B")


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f} {unit}"
    raise AssertionError


def notes(found: Sequence[Row]) -> list[str]:
    """Why cells have no figures, and what makes figures doubtful."""
    said = []
    for row in found:
        if not row.ok:
            said.append(f"{row.planned.name}: {row.line['status']}: {row.line['reason']}")
        elif not row.line["as_predicted"]:
            predicted = sent(row.line["bytes_predicted"])
            said.append(f"{row.planned.name}: sent {sent(row.line['bytes_traced'])}, predicted {predicted} (!)")
        said += [f"{row.planned.name}: {note}" for note in idle.notes(row.planned.cell)]
    ok = [row.line for row in found if row.ok]
    if len({line["commit"] for line in ok}) > 1:
        said.append("measured at several commits: " + ", ".join(sorted({str(line["commit"])[:8] for line in ok})))
    if len({str(line["machine"]) for line in ok}) > 1:
        said.append("measured on several machines")
    cores = min((line["machine"]["cores"] for line in ok), default=0)
    busy = [row for row in found if row.ok and row.line["load"][0] > cores / 2]
    if busy and min(row.line["load"][0] for row in busy) is not None:
        most = max(row.line["load"][0] for row in busy)
        said.append(
            f"{len(busy)} of {len(ok)} cells began while the machine's load of the last minute was over half its cores "
            f"(up to {most:.1f} on {cores}; earlier cells count in it)"
        )
    crowded = [row for row in found if row.ok and row.planned.cell.device == "cpu" and row.ranks > cores]
    if crowded:
        said.append(f"cells of more than {cores} ranks share the {cores} cores: their ranks take turns")
    return said
