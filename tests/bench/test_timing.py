"""Statistics and turns of the measurements."""

from __future__ import annotations

import gc
import math

import pytest

from shardgrad.bench.timing import Spread, in_turns, ratio


@pytest.mark.parametrize(
    ("count", "low", "high"), [(1, 0, 0), (3, 0, 2), (5, 0, 4), (6, 0, 5), (11, 1, 9), (25, 7, 17)]
)
def test_the_interval_holds_the_median_with_95_percent(count: int, low: int, high: int) -> None:
    """Of the order statistics; the tabulated ranks for n = 6, 11, 25 are 1 and 6, 2 and 10, 8 and 18."""
    values = [float((7 * at) % count if math.gcd(7, count) == 1 else at) for at in range(count)]
    spread = Spread.of(values)
    assert (spread.median, spread.low, spread.high) == ((count - 1) / 2, low, high)


def test_ratios_are_taken_round_by_round() -> None:
    """A load that triples one round's times leaves its ratio alone."""
    base = [1.0, 3.0, 1.0, 9.0, 2.0]
    assert ratio([2 * value for value in base], base) == Spread(2, 2, 2)
    assert ratio([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]) == Spread(0.5, 0.25, 1)
    with pytest.raises(ValueError):
        ratio([1.0], base)


def test_everyone_has_a_turn_in_every_round_and_the_first_moves_on() -> None:
    now, log = [0.0], []

    def work(name: str, seconds: float) -> None:
        log.append(name)
        now[0] += seconds

    calls = {name: (lambda name=name, s=s: work(name, s)) for name, s in (("a", 1.0), ("b", 2.0), ("c", 8.0))}
    was = gc.isenabled()
    found = in_turns(calls, 3, turn=4.0, clocks=(lambda: now[0], lambda: 2 * now[0]), warm_up=2)
    assert gc.isenabled() == was
    assert found == {"a": [[1.0] * 3, [2.0] * 3], "b": [[2.0] * 3, [4.0] * 3], "c": [[8.0] * 3, [16.0] * 3]}
    a, b, c = ["a"] * 4, ["b"] * 2, ["c"]
    warm = ["a", "a", "b", "b", "c", "c", "a", "b", "c"]
    assert log == [*warm, *a, *b, *c, *b, *c, *a, *c, *a, *b]


def test_the_slowest_ranks_figures_are_kept() -> None:
    now = [0.0]

    def call() -> None:
        now[0] += 1

    found = in_turns({"a": call}, 2, turn=3, clocks=(lambda: now[0],), slowest=lambda mine: [5 * x for x in mine])
    assert found == {"a": [[5.0, 5.0]]}
