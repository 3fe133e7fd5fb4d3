"""Results on disk and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardgrad.scale import compare, results, table
from shardgrad.scale.config import load
from shardgrad.settings import ConfigError


def rank(seconds: list[float], talking: list[float], traced: dict[str, int], memory: int = 5) -> dict[str, Any]:
    predicted = {"all-reduce over tp": 7}
    figures = {"seconds": seconds, "communicating": talking, "predicted": predicted, "traced": traced}
    return {**figures, "memory": memory, "flops": 600.0, "tokens": 12}


def test_a_step_is_as_long_as_on_its_slowest_rank() -> None:
    same = {"all-reduce over tp": 7}
    line = results.summed(
        [rank([1.0, 5.0, 3.0], [0.5, 1.0, 2.0], same), rank([2.0, 4.0, 1.0], [1.5, 3.0, 0.0], same, 9)]
    )
    assert line["steps"] == [2.0, 5.0, 3.0]
    assert line["seconds"] == 3.0
    assert line["quartiles"] == [2.5, 4.0]
    assert line["communicating"] == 1.0  # the median of the ranks' means 1, 2, 1
    assert line["tokens_per_second"] == 4.0
    assert line["peak_memory"] == 9
    assert line["as_predicted"]
    assert line["bytes_predicted"] == line["bytes_traced"] == [7, 7]


def test_other_bytes_than_predicted_on_any_rank_are_seen() -> None:
    one, other = {"all-reduce over tp": 7}, {"all-gather over tp": 7}
    line = results.summed([rank([1.0], [0.0], one), rank([1.0], [0.0], other)])
    assert not line["as_predicted"]  # as many bytes, but of something else


def test_a_line_that_was_cut_short_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    measuring = {"seed": 0}
    with results.opened(tmp_path) as opened:
        opened.add({"key": "a", "status": "failed", "measuring": measuring})
        opened.add({"key": "a", "status": "ok", "measuring": measuring})
    with (tmp_path / results.FILE).open("a") as file:
        file.write('{"key": "b", "sta')
    assert [line["status"] for line in results.read(tmp_path)] == ["failed", "ok"]
    with results.opened(tmp_path) as opened:
        found = opened.latest("a", measuring)
        assert found is not None
        assert found["status"] == "ok"
        assert opened.latest("a", {"seed": 1}) is None
        assert opened.latest("b", measuring) is None
        with pytest.raises(ConfigError, match="another process"), results.opened(tmp_path):
            pass
        opened.add({"key": "c", "status": "ok", "measuring": measuring})
    assert [json.loads(line)["key"] for line in (tmp_path / results.FILE).read_text().splitlines()] == ["a", "a", "c"]


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"key": "a", "status": "ok"}\n[]\n')
    with pytest.raises(ConfigError, match="line 2"):
        results.read(tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match="cannot read results"):
        results.read(tmp_path / "none.jsonl")


def line(key: str, seconds: float, flops: float, **more: Any) -> dict[str, Any]:
    spread = [seconds * 0.9, seconds * 1.1]
    return {"key": key, "name": key, "status": "ok", "seconds": seconds, "quartiles": spread, "flops": flops, **more}


def test_speed_up_counts_work_so_that_it_holds_where_sizes_grow(tmp_path: Path) -> None:
    path = tmp_path / "weak.yaml"
    path.write_text("title: t\nmatrix: {layout: [column, row], sizes: {n: 8, d: 4, m: 4}, ranks: [2, 4]}")
    planned = load(path).planned
    failed = {"key": "x", "status": "failed", "reason": "no"}
    lines = [line("a", 2.0, 100.0), line("b", 4.0, 300.0), line("c", 1.0, 50.0), failed]
    rows = table.rows(planned, lines)
    # Two ranks are the least: their rate is 2 by definition. Three times the work in twice the time: 2 · 3 / 2.
    assert rows[0].speed_up == pytest.approx(2.0)
    assert rows[1].speed_up == pytest.approx(3.0)
    assert rows[1].efficiency == pytest.approx(0.75)
    assert rows[1].speed_up_quartiles == pytest.approx((3.0 / 1.1, 3.0 / 0.9))
    assert rows[2].speed_up is None  # nothing to compare it with is left


def test_two_results_compare_by_cell() -> None:
    a = [
        line("same", 1.0, 1.0),
        line("slower", 1.0, 1.0),
        line("faster", 1.0, 1.0),
        line("gone", 1.0, 1.0),
        {"key": "bad", "status": "failed"},
    ]
    b = [line("slower", 9.0, 1.0), line("slower", 1.5, 1.0), line("same", 1.1, 1.0), line("faster", 0.5, 1.0)]
    b.append(line("new", 1.0, 1.0))
    both, only_a, only_b = compare.pairs(a, b)
    assert [(pair.name, pair.verdict) for pair in both] == [
        ("same", "within the spread"),
        ("slower", "slower"),
        ("faster", "faster"),
    ]
    assert both[1].ratio == pytest.approx(1.5)  # of the last result
    assert [one["key"] for one in only_a] == ["gone"]
    assert [one["key"] for one in only_b] == ["new"]
