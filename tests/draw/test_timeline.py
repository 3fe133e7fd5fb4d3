"""A step in time, from profiles made up so that every figure is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardgrad.draw.timeline import STEP, Span, _asked, lanes, length, merged, summary, union, without
from shardgrad.draw.timeline_picture import draw, picture

MAIN, GLOO = 11, 12


def event(name: str, start: float, end: float, tid: int = MAIN, cat: str = "user_annotation") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 99, "tid": tid, "ts": start, "dur": end - start}


def operation(name: str, start: float, end: float) -> dict[str, Any]:
    return event(f"aten::{name}", start, end, cat="cpu_op")


def profile(shift: float = 0.0, base: int = 5_000_000, gloo: bool = True) -> dict[str, Any]:
    """A step of 10 ms whose all-reduce of dX travels from 4 to 7 ms, under a product until 5 and a wait until 7.5."""
    events = [
        event(STEP, 0, 10_000),
        event("forward", 0, 3_000),
        event("backward", 3_000, 9_000),
        event("optimizer", 9_000, 10_000),
        operation("matmul", 1_000, 2_600),
        operation("mm", 1_100, 2_500),
        operation("gelu", 2_700, 2_900),
        operation("mm", 3_200, 3_700),
        event("start all-reduce of dX over tp", 3_800, 3_900),
        event("c10d::allreduce_", 3_810, 3_890, cat="cpu_op"),
        operation("mm", 4_000, 5_000),
        event("wait for all-reduce of dX over tp", 5_500, 7_500),
        event("start all-gather of W over dp", 7_600, 7_700),
        event("wait for all-gather of W over dp", 7_700, 8_000),
        operation("add_", 9_100, 9_300),
        operation("mm", 10_500, 11_000),  # after the step
        event("aten::mm", 100, 200, tid=77, cat="cpu_op"),  # another thread's
        {"ph": "s", "cat": "fwdbwd", "name": "fwdbwd", "id": 3, "pid": 99, "tid": MAIN, "ts": 1_100},
        {"ph": "M", "name": "process_name", "pid": 99, "tid": 0, "args": {"name": "python"}},
    ]
    if gloo:
        # two threads: dX's and, meanwhile, one that nobody here started
        events += [event("gloo:all_reduce", 4_000, 7_000, GLOO), event("gloo:all_gather", 7_750, 7_950, GLOO)]
        events += [event("gloo:all_reduce", 6_000, 7_200, GLOO + 1)]
        events += [event("gloo:barrier", -500, 30, GLOO)]
    for one in events:
        if "ts" in one:
            one["ts"] += shift
    return {"baseTimeNanoseconds": base, "traceEvents": events}


def test_a_step_is_what_the_profile_says() -> None:
    (lane,) = lanes([profile(shift=123.5)])
    assert (lane.rank, lane.start, lane.end) == (0, 0.0, 10_000.0)
    travels = [span for span in lane.spans if span.kind == "travel"]
    assert travels == [
        Span("travel", "all-reduce dX over tp", 4_000, 7_000),
        Span("travel", "all-reduce", 6_000, 7_200),
        Span("travel", "all-gather W over dp", 7_750, 7_950),
    ]
    assert [span.name for span in lane.spans if span.kind == "phase"] == ["forward", "backward", "optimizer"]
    told = summary(lane)
    assert told.step == 10.0
    assert told.products == pytest.approx(1.4 + 0.5 + 1.0)
    assert told.operations == pytest.approx(0.1 + 0.1 + 0.2 + 0.2)  # around mm in matmul, gelu, add_; not c10d's own
    assert told.starting == pytest.approx(0.1 + 0.1)
    assert told.waiting == pytest.approx(2.0 + 0.3)
    assert told.travelling == pytest.approx(3.2 + 0.2)
    assert told.hidden == pytest.approx(1.5)  # from 4 to 5.5; the rest is waited for
    assert told.collectives == 2


def test_a_backend_that_tells_nothing_travels_from_start_to_the_end_of_the_wait() -> None:
    (lane,) = lanes([profile(gloo=False)])
    assert [(s.name, s.start, s.end) for s in lane.spans if s.kind == "travel"] == [
        ("all-reduce dX over tp", 3_800, 7_500),
        ("all-gather W over dp", 7_600, 8_000),
    ]


def test_ranks_share_one_clock() -> None:
    late = profile(shift=250.0, base=7_000_000)  # 2000 microseconds later by its base, and 250 by its events
    early, other = lanes([late, profile()])[::-1]
    assert (early.rank, early.start) == (1, 0.0)
    assert (other.rank, other.start, other.end) == (0, 2_250.0, 12_250.0)
    whole = merged([late, profile()])
    begins = {e["pid"]: e["ts"] for e in whole["traceEvents"] if e.get("name") == STEP}
    assert begins == {0: 2_250.0, 1: 0.0}
    assert {e["pid"]: e["args"]["name"] for e in whole["traceEvents"] if e["name"] == "process_name"} == {
        0: "rank 0",
        1: "rank 1",
    }
    assert {e["id"] for e in whole["traceEvents"] if "id" in e} == {"0.3", "1.3"}


def test_a_profile_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="a profile holds 0 spans named 'shardgrad step', not one"):
        lanes([{"traceEvents": []}])


def test_intervals() -> None:
    assert union([(5, 6), (1, 2), (2, 3), (2.5, 2.7), (4, 4)]) == [(1, 3), (5, 6)]
    assert without([(0, 10), (12, 13)], [(-1, 1), (2, 3), (9, 12.5)]) == [(1, 2), (3, 9), (12.5, 13)]
    assert length([(1, 3), (5, 6)]) == 3


def test_the_picture(tmp_path: Path) -> None:
    found = lanes([profile(), profile(shift=500.0)])
    paper = picture(found, "a step")
    texts = [t.text for t in paper.texts]
    assert texts.count("waits 2.3 ms of 10.0;  hidden 1.5 ms of 3.4 travelling") == 2
    assert {"rank 0", "rank 1", "forward", "backward", "optimizer", "all-reduce dX over tp"} <= set(texts)
    bars = [where for kind, where, style in paper.patches if kind == "stripes" and where[4] == ("#CC3311", "#ffffff")]
    assert len(bars) == 2 * 2 + 1  # two waits a rank, and the legend
    scale = 10.0 / 10_500
    assert bars[0][0] == pytest.approx(0.75 + 5_500 * scale)
    assert bars[0][2] == pytest.approx(2_000 * scale)
    draw(found, "a step", tmp_path / "step.svg")
    assert (tmp_path / "step.svg").read_text().count("<!-- rank ") == 2
    with pytest.raises(ValueError, match="a picture ends in"):
        draw(found, "a step", tmp_path / "step.jpg")


def test_a_wait_is_for_the_last_start_of_its_name() -> None:
    """Of two reduce-scatters of one name the first was done at once; an all-reduce travels past both."""
    starts = [
        ("all-reduce dW over dp", 0.0, 1.0),
        ("reduce-scatter over tp", 2.0, 3.0),
        ("reduce-scatter over tp", 8.0, 9.0),
    ]
    waits = [("reduce-scatter over tp", 12.0, 15.0), ("all-reduce dW over dp", 16.0, 20.0)]
    assert _asked(starts, waits) == [
        ("all-reduce dW over dp", 0.0, 20.0),
        ("reduce-scatter over tp", 2.0, 3.0),
        ("reduce-scatter over tp", 8.0, 15.0),
    ]
