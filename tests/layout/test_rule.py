"""What is legal, why not, and the nearest layouts that are."""

from __future__ import annotations

import random
import re

import pytest
from layouts import random_layout

from shardgrad import Layout, LayoutError

ILLEGAL = [
    # text, (column of the caret, its width), words of the reason
    (
        "X[n/tp,d] W[d,m] -> Y[n,m]",
        (4, 2),
        "axis tp splits no letter: X has it on n, but Y, which also carries n, does not",
    ),
    ("X[n,d/tp] W[d,m] -> Y[n,m]", (6, 2), "W, which also carries d, does not have tp there"),
    ("X[n/tp,d] W[d/tp,m] -> Y[n,m]", (4, 2), "axis tp splits no letter"),
    ("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp] + B[m/dp]", (39, 2), "axis dp stands only in the bias B"),
    ("X[n,d] W[d,m/tp] -> Y[n,m/tp] + B[k]", (34, 1), "the bias B carries k, which Y does not"),
    ("X[n/tp,d/tp] W[d,m/tp] -> Y[n,m/tp]", (4, 2), "axis tp stands twice in X"),
    ("X[n,n] W[n,m] -> Y[n,m]", (2, 1), "letter n stands twice in X"),
    ("X[n,d] X[d,m] -> Y[n,m]", (0, 1), "two tensors are called X"),
    ("X[n,d] W[e,m] -> Y[n,m]", (4, 1), "letter d stands in X alone, so it would be summed away without a partner"),
    ("X[n,d] W[d,m] -> Y[n,m,z]", (23, 1), "letter z stands in Y alone, so it would be made from nothing"),
    ("X[n/a/b,d] W[d,m/a] -> Y[n/b,m/a]", (4, 1), "on n/a/b of X, a only stores (it splits m) but stands before b"),
    ("X[n/a/b,d] W[d,m] -> Y[n/b/a,m]", (23, 1), "all carriers list the axes that split a letter in one order"),
    ("X[e/t,n,d] W[e,d,m] -> Y[e,n,m]", (4, 1), "axis t splits no letter"),
    ("X[n,d]{tp} W[d/tp,m] -> Y[n,m]", (15, 2), "axis tp splits no letter"),
    ("X[n,d]{tp} W[d,m] -> Y[n,m]", (0, 1), "dX is no sum over tp (it is summed over no axis)"),
    ("X[n/tp,d]{tp} W[d,m/tp] -> Y[n,m/tp]", (4, 2), "it cannot be left partial over tp as well"),
    ("X[n,d/tp] W[d/tp,m] -> Y[n,m/tp]{tp}", (29, 2), "Y is sharded over tp on m, so Y is complete there"),
    ("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp,tp}", (23, 1), "tp stands twice in the braces of Y"),
    ("X[n,d] W[d,m/tp]{tp} -> Y[n,m/tp]", (13, 2), "dW is complete there"),
]


@pytest.mark.parametrize(("text", "caret", "why"), ILLEGAL)
def test_refused_with_the_place_and_the_reason(text: str, caret: tuple[int, int], why: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout(text)
    lines = str(caught.value).split("\n")
    assert lines[:2] == ["illegal layout", f"  {text}"]
    assert (lines[2].index("^") - 2, lines[2].count("^")) == caret
    assert why in str(caught.value)


def proposals(text: str) -> list[str]:
    with pytest.raises(LayoutError) as caught:
        Layout(text)
    return re.findall(r"^  (\S.*->.*)$", str(caught.value), re.MULTILINE)[1:]


def test_nearest_legal_layouts_change_least() -> None:
    assert "X[n/tp,d] W[d,m] -> Y[n/tp,m]" in proposals("X[n/tp,d] W[d,m] -> Y[n,m]")
    assert "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]" in proposals("X[n/tp,d] W[d,m] -> Y[n,m/tp]")
    assert proposals("X[n/a/b,d] W[d,m] -> Y[n/b/a,m]") == [
        "X[n/a/b,d] W[d,m] -> Y[n/a/b,m]",
        "X[n/b/a,d] W[d,m] -> Y[n/b/a,m]",
    ]
    assert proposals("X[n,d] W[d,m/tp]{tp} -> Y[n,m/tp]")[0] == "X[n,d] W[d,m/tp] -> Y[n,m/tp]"
    assert proposals("X[n,n] W[n,m] -> Y[n,m]") == []
    assert proposals("X[n/dp,d] W[d/dp,m/dp] -> Y[n/dp,m]")[:2] == [
        "X[n/dp,d] W[d,m/dp] -> Y[n/dp,m]",
        "X[n/dp,d] W[d/dp,m] -> Y[n/dp,m]",
    ]
    assert proposals("X[n/tp,d] W[d,m] -> Y[n/tp,m/tp]")[0] == "X[n/tp,d] W[d,m] -> Y[n/tp,m]"


def test_marks_are_kept_where_they_can_be_and_dropped_where_they_are_what_is_wrong() -> None:
    assert proposals("X[n,d/tp] W[d/tp,m] -> Y[n,m]{dp}") == ["X[n,d/tp] W[d/tp,m] -> Y[n,m]"]
    assert proposals("X[n,d]{tp} W[d,m] -> Y[n,m/tp]")[0] == "X[n,d]{tp} W[d,m/tp] -> Y[n,m/tp]"


def test_an_axis_removed_from_or_moved_in_a_legal_layout_is_legal_or_refused_with_legal_proposals() -> None:
    rng = random.Random(11)
    refused = 0
    for _ in range(300):
        text = str(random_layout(rng, ("p", "q", "r"), bias=False, marks=False))
        places = [m.span() for m in re.finditer(r"/[pqr]", text)]
        if not places:
            continue
        start, end = rng.choice(places)
        broken = text[:start] + text[end:]
        try:
            Layout(broken)
        except LayoutError as error:
            refused += 1
            near = re.findall(r"^  (\S.*->.*)$", str(error), re.MULTILINE)[1:]
            assert near, f"no proposal for {broken}"
            for proposal in near:
                Layout(proposal)
                assert proposal != broken
    assert refused > 100


def test_random_legal_layouts_are_read_as_they_were_drawn() -> None:
    rng = random.Random(3)
    seen = set()
    for _ in range(500):
        layout = random_layout(rng, ("p", "q", "r"))
        for axis, letter in layout.splits.items():
            carriers = [t for t in (layout.lhs, layout.rhs, layout.out) if letter in t.letters]
            assert all(t.letter_with(axis) == letter for t in carriers)
        seen.add((len(layout.rows), len(layout.contracted), len(layout.columns), len(layout.batched)))
    assert len(seen) > 20
