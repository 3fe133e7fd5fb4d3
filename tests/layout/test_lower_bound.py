"""The lower bound by hand in each regime, at the borders, and attained."""

from __future__ import annotations

from itertools import permutations

import pytest

from shardgrad import PRESETS
from shardgrad.layout.lower_bound import best_grid, grid_words, least_words


@pytest.mark.parametrize(
    ("m", "n", "k", "ranks", "words"),
    [
        (64, 8, 2, 4, 16 * (1 - 1 / 4)),  # P ≤ 8: nk, less the part of it that is there
        (64, 8, 2, 8, 16 * (1 - 1 / 8)),  # the border
        (64, 16, 4, 16, 2 * (64 * 16 * 16 / 16) ** 0.5 - (64 * 4 + 16 * 4) / 16),  # 4 ≤ P ≤ 64
        (8, 8, 8, 8, 3 * 16 - 3 * 64 / 8),  # 1 ≤ P: (512/8)^⅔ = 16
        (64, 64, 8, 4096, 3 * (64 * 64 * 8 / 4096) ** (2 / 3) - (4096 + 2 * 512) / 4096),  # P ≥ 64
    ],
)
def test_by_hand(m: int, n: int, k: int, ranks: int, words: float) -> None:
    for sizes in permutations((m, n, k)):
        assert least_words(*sizes, ranks) == pytest.approx(words)


def test_no_step_at_the_borders() -> None:
    """Left and right of a border, with sizes so large that one unit of a size is little."""
    for m, n, k in ((600_000, 60_000, 6_000), (600_000, 60_000, 60_000), (360_000, 360_000, 60_000)):
        for ranks in {m // n, m * n // (k * k)}:
            around = [least_words(m + at, n, k, ranks) for at in (-1, 0, 1)]
            assert max(around) - min(around) <= 4e-5 * max(around[1], 1)


def test_the_two_formulas_agree_at_a_border() -> None:
    """At P = m/n both give 2nk + mk/P..., at P = mn/k² both give 3k²: written out."""
    m, n, k = 64, 8, 2
    at = m // n
    assert (m * n + m * k) / at + n * k == pytest.approx(m * n / at + 2 * (m * n * k * k / at) ** 0.5)
    m, n, k = 64, 16, 4
    at = m * n // (k * k)
    assert least_words(m, n, k, at) == pytest.approx(3 * k * k - (m * n + m * k + n * k) / at)


@pytest.mark.parametrize(
    ("n", "d", "m", "ranks", "grid"),
    [
        (64, 64, 64, 8, (2, 2, 2)),
        (64, 64, 64, 64, (4, 4, 4)),
        (1024, 64, 64, 16, (16, 1, 1)),  # the weight is smallest: fully sharded
        (64, 64, 1024, 16, (1, 1, 16)),
        (64, 1024, 64, 16, (1, 16, 1)),
        (256, 64, 256, 16, (4, 1, 4)),  # Y is largest and stays
        (256, 256, 64, 16, (4, 4, 1)),
    ],
)
def test_the_best_grid_attains_it_and_so_does_the_layout(
    n: int, d: int, m: int, ranks: int, grid: tuple[int, int, int]
) -> None:
    least = least_words(n, d, m, ranks)
    assert best_grid(n, d, m, ranks) == grid
    assert grid_words(n, d, m, grid) == pytest.approx(least)
    mesh = dict(zip("abc", grid))
    sent = dict.fromkeys(("forward", "dX", "dW"), 0)
    for one in PRESETS["3d"].collectives({"n": n, "d": d, "m": m}, mesh, "float32"):
        sent[one.phase] += one.bytes // 4
    assert sent["forward"] == pytest.approx(least, rel=1e-12)
    assert sent["dX"] == pytest.approx(least, rel=1e-12)
    assert sent["dW"] <= least * (1 + 1e-12)  # dY is there already, gathered for dX


def test_no_grid_is_below_it() -> None:
    for n, d, m in ((7, 5, 3), (100, 10, 1), (12, 12, 12), (3, 50, 9)):
        for ranks in (1, 2, 6, 12, 30, 64):
            assert grid_words(n, d, m, best_grid(n, d, m, ranks)) >= least_words(n, d, m, ranks) - 1e-9


def test_one_rank_and_nonsense() -> None:
    assert least_words(5, 4, 3, 1) == pytest.approx(0)
    for sizes in ((0, 1, 1, 1), (1, 1, 1, 0)):
        with pytest.raises(ValueError, match="positive"):
            least_words(*sizes)
