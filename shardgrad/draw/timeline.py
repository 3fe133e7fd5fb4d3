"""One training step in time, read from what torch.profiler recorded on each rank: what computes, travels and waits.

A rank's own thread computes or waits; collectives travel beside it, in threads of the backend. Of the time that
collectives travel, what the rank does not spend waiting for them is hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["phase", "product", "operation", "start", "wait", "travel"]
Pair = tuple[float, float]
_Timed = tuple[str, float, float]  # a name, from when, until when

STEP = "shardgrad step"  # how the profiled program names the whole step, and its parts
PHASES = ("forward", "backward", "optimizer")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_", "addbmm", "addmv", "mv", "dot", "convolution")
_ATTENTION = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math")
# gloo carries a reduce-scatter as an all-reduce, and says so.
_CARRIED = {"reduce-scatter": "all_reduce", "all-reduce": "all_reduce", "all-gather": "all_gather"}


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `start` to `end`, in microseconds since the step's begin on the first rank."""

    kind: Kind
    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Lane:
    """A rank's step. Spans of one kind do not contain each other."""

    rank: int
    start: float
    end: float
    spans: tuple[Span, ...]

    def pairs(self, kind: Kind) -> list[Pair]:
        """When something of a kind was going on: disjoint, in order."""
        return union((span.start, span.end) for span in self.spans if span.kind == kind)


@dataclass(frozen=True, slots=True)
class Summary:
    """Milliseconds of a rank's step; what they leave of it is Python.

    operations: everything but products; starting: asking for collectives; waiting: blocked on one; travelling: any
    collective under way; hidden: travelling while the rank did not wait.
    """

    rank: int
    step: float
    products: float
    operations: float
    starting: float
    waiting: float
    travelling: float
    hidden: float
    collectives: int


def union(pairs: Iterable[Pair]) -> list[Pair]:
    """The intervals joined where they touch or overlap."""
    joined: list[Pair] = []
    for start, end in sorted(pairs):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif end > start:
            joined.append((start, end))
    return joined


def without(pairs: Sequence[Pair], holes: Sequence[Pair]) -> list[Pair]:
    """Disjoint intervals less other disjoint intervals, both in order."""
    left = []
    for start, end in pairs:
        for low, high in holes:
            if high <= start or low >= end:
                continue
            if low > start:
                left.append((start, low))
            start = max(start, high)
        if start < end:
            left.append((start, end))
    return left


def length(pairs: Iterable[Pair]) -> float:
    """The sum of the intervals' lengths."""
    return sum(end - start for start, end in pairs)


def lanes(profiles: Sequence[Mapping[str, Any]]) -> tuple[Lane, ...]:
    """The step of every rank, from its profile as `torch.profiler` exports it, in the ranks' order.

    Raises:
        ValueError: a profile does not hold a step.
    """
    times = [_Times(profile) for profile in profiles]
    zero = min(one.step[0] for one in times)
    return tuple(one.lane(rank, zero) for rank, one in enumerate(times))


class _Times:
    """One profile: events with a duration, their times made absolute."""

    def __init__(self, profile: Mapping[str, Any]) -> None:
        # Ranks choose their own base; what lies between two bases is a whole number of nanoseconds.
        self.base = float(profile.get("baseTimeNanoseconds", 0)) / 1000
        self.events = [event for event in profile["traceEvents"] if event.get("ph") == "X" and "dur" in event]
        steps = [event for event in self.events if event["name"] == STEP]
        if len(steps) != 1:
            raise ValueError(f"a profile holds {len(steps)} spans named {STEP!r}, not one")
        self.thread = steps[0]["tid"]
        self.step = self._pair(steps[0])

    def _pair(self, event: Mapping[str, Any]) -> Pair:
        start = self.base + float(event["ts"])
        return start, start + float(event["dur"])

    def lane(self, rank: int, zero: float) -> Lane:
        found: dict[Kind, list[_Timed]] = {}
        for event in self.events:
            kind, name = self._kind(event)
            start, end = self._pair(event)
            if kind is not None and start < self.step[1] and end > self.step[0]:
                found.setdefault(kind, []).append((name, start - zero, end - zero))
        found = {kind: _outermost(spans) for kind, spans in found.items()}
        starts, waits = found.get("start", []), found.get("wait", [])
        found["travel"] = _named(found.get("travel", []), starts) or _asked(starts, waits)
        spans = [Span(kind, *one) for kind, listed in found.items() for one in listed]
        return Lane(
            rank, self.step[0] - zero, self.step[1] - zero, tuple(sorted(spans, key=lambda s: (s.start, s.end)))
        )

    def _kind(self, event: Mapping[str, Any]) -> tuple[Kind | None, str]:
        name = event["name"]
        if name.startswith("gloo:"):
            carried = name.removeprefix("gloo:")
            return (None if carried == "barrier" else "travel"), carried  # the barrier is the profiled program's own
        if event["tid"] != self.thread:
            return None, name
        if name in PHASES:
            return "phase", name
        for kind, verb in (("start", "start "), ("wait", "wait for ")):
            if name.startswith(verb) and " over " in name:
                return kind, name.removeprefix(verb).replace(" of ", " ", 1)  # type: ignore[return-value]
        if event.get("cat") != "cpu_op":
            return None, name
        short = name.removeprefix("aten::")
        return ("product" if short in _PRODUCTS or short.startswith(_ATTENTION) else "operation"), short


def _outermost(spans: list[_Timed]) -> list[_Timed]:
    """Those that no other contains."""
    kept: list[_Timed] = []
    for span in sorted(spans, key=lambda s: (s[1], -s[2])):
        if not kept or span[1] >= kept[-1][2] or span[0] in _CARRIED.values():
            kept.append(span)
    return kept


def _named(travels: list[_Timed], starts: list[_Timed]) -> list[_Timed]:
    """What gloo's threads carried, by the names of what was started: in the order in which it was."""
    waiting = sorted(starts, key=lambda s: s[1])
    named = []
    for carried, begin, end in sorted(travels, key=lambda s: s[1]):
        mine = next((s for s in waiting if _CARRIED.get(s[0].split()[0], carried) == carried and s[1] <= begin), None)
        if mine is not None:
            waiting.remove(mine)
        named.append((mine[0] if mine else carried.replace("_", "-"), begin, end))
    return named


def _asked(starts: list[_Timed], waits: list[_Timed]) -> list[_Timed]:
    """Where the backend does not say when it carried what: from the start to the end of the wait.

    What was done as soon as it was started is not waited for: a wait is for the last of its name that was started.
    """
    open_starts = sorted(starts, key=lambda s: s[1])
    spans = []
    for name, begin, end in sorted(waits, key=lambda s: s[1]):
        mine = next((s for s in reversed(open_starts) if s[0] == name and s[1] <= begin), None)
        if mine is not None:
            open_starts.remove(mine)
            spans.append((name, mine[1], end))
    return sorted([*spans, *open_starts], key=lambda s: s[1])


def summary(lane: Lane) -> Summary:
    """How a rank spent its step."""
    waiting, travelling, products = lane.pairs("wait"), lane.pairs("travel"), lane.pairs("product")
    communicating = union([*waiting, *lane.pairs("start")])
    other = without(lane.pairs("operation"), union([*communicating, *products]))
    return Summary(
        rank=lane.rank,
        step=(lane.end - lane.start) / 1000,
        products=length(products) / 1000,
        operations=length(other) / 1000,
        starting=length(lane.pairs("start")) / 1000,
        waiting=length(waiting) / 1000,
        travelling=length(travelling) / 1000,
        hidden=length(without(travelling, waiting)) / 1000,
        collectives=sum(span.kind == "start" for span in lane.spans),
    )


def merged(profiles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One trace for Perfetto or chrome://tracing: a process for each rank, all on one clock."""
    bases = [int(profile.get("baseTimeNanoseconds", 0)) for profile in profiles]
    base = min(bases)
    events: list[dict[str, Any]] = []
    for rank, (profile, own) in enumerate(zip(profiles, bases)):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}})
        for event in profile["traceEvents"]:
            if event.get("ph") == "M" and event["name"] in ("process_name", "process_labels", "process_sort_index"):
                continue
            moved = {**event, "pid": rank}
            if "ts" in event:
                moved["ts"] = float(event["ts"]) + (own - base) / 1000
            if "id" in event:  # arrows between forward and backward: numbered by each rank for itself
                moved["id"] = f"{rank}.{event['id']}"
            events.append(moved)
    return {"schemaVersion": 1, "displayTimeUnit": "ms", "baseTimeNanoseconds": base, "traceEvents": events}
