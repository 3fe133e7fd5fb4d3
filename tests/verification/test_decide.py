"""What steps say together, of tensors that are made up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardgrad.comm.mesh import MeshView
from shardgrad.verification.compare import measure
from shardgrad.verification.decide import Found, by_float64, by_three
from shardgrad.verification.observed import Split
from shardgrad.verification.rounding import Spread
from shardgrad.verification.steps import judge

ALONE = MeshView({}, torch.device("cpu"), {}, {})
KEY = ("gradient", "w")


def step(*wrong: int, order: int = 0, exact: float = 1.0) -> Found:
    """A step whose one tensor, of 100 elements, is wrong at some."""
    generator = torch.Generator().manual_seed(len(wrong))
    value = torch.full((100,), exact, dtype=torch.float64)
    spread = Spread(value)
    for _ in range(3):
        spread.add(value + torch.randn(100, generator=generator) * abs(exact) * 1e-6)
    got: Tensor = value.clone()
    got[list(wrong)] *= 2
    return judge([measure(KEY, Split.of([()]), (100,), got, spread, order, ALONE)], ALONE)


def nothing_changes(keys: object) -> set:
    return set()


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [
        ([(), (), ()], "rounding"),
        ([(1, 2), (), ()], "cannot tell"),
        ([(), (1, 2), ()], "cannot tell"),
        ([(1, 2), (3, 4), (5,)], "cannot tell"),
        ([(1, 2, 3, 4), (4, 5, 6, 7), ()], "cannot tell"),
        ([(1, 2), (1, 2), ()], "bug"),
        ([(), (1, 2, 9), (1, 2, 7)], "bug"),
        ([(1,), (), (1, 2, 3)], "bug"),
    ],
)
def test_by_which_elements_are_wrong(steps: list[tuple[int, ...]], verdict: str) -> None:
    found = by_three([step(*one) for one in steps], nothing_changes, ALONE)
    assert found[KEY].row.verdict == verdict
    changing = by_three([step(*one) for one in steps], set, ALONE)[KEY].row.verdict
    alone = sum(bool(one) for one in steps) == 1
    assert changing == ("not the same twice" if alone else verdict)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [((), (), "rounding"), ((1,), (), "cannot tell"), ((), (1,), "bug"), ((1,), (2,), "bug")],
)
def test_float64_decides(first: tuple[int, ...], second: tuple[int, ...], verdict: str) -> None:
    one, other = step(*first, order=7), step(*second, order=9)
    found = by_float64(one, other, nothing_changes)[KEY]
    assert (found.row.verdict, found.row.order) == (verdict, 7)
    assert found.row.in_float64 == (verdict == "bug" and not first)
    assert (found.measured is other[KEY].measured) == bool(second), "its evidence is sharper"
    told = by_float64(one, other, set)[KEY].row.verdict
    assert told == ("not the same twice" if verdict == "cannot tell" else verdict)
    assert by_float64({}, other, set)[KEY].row.order == 9


def test_what_is_zero_in_one_step_alone_is_judged_by_the_other() -> None:
    assert by_float64(step(exact=0.0), step(exact=0.0), set)[KEY].row.verdict == "not judged"
    assert by_float64(step(exact=0.0), step(), set)[KEY].row.verdict == "rounding"
