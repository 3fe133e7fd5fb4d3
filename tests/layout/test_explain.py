"""The table of the design, read off `explain` and the plan: what is communicated, when, along which axis."""

from __future__ import annotations

import pytest

from shardgrad import PRESETS, Layout

G, R, A = "all-gather", "reduce-scatter", "all-reduce"

# phase -> operations in order, as (operation, tensor, axis): the table of published schemes, kept nothing from forward
TABLE = {
    "column": {"dX": [(A, "dX", "tp")]},
    "column_sequence": {"forward": [(G, "X", "tp")], "dX": [(R, "dX", "tp")], "dW": [(G, "X", "tp")]},
    "row": {"forward": [(A, "Y", "tp")]},
    "row_sequence": {"forward": [(R, "Y", "tp")], "dX": [(G, "dY", "tp")]},
    "data": {"dW": [(A, "dW", "dp")], "db": [(A, "db", "dp")]},
    "fully_sharded": {
        "forward": [(G, "W", "dp")],
        "dX": [(G, "W", "dp")],
        "dW": [(R, "dW", "dp")],
        "db": [(A, "db", "dp")],
    },
    "2d": {
        "forward": [(G, "X", "c"), (G, "W", "r")],
        "dX": [(G, "W", "r"), (R, "dX", "c")],
        "dW": [(G, "X", "c"), (R, "dW", "r")],
        "db": [(A, "db", "r")],
    },
    "2.5d": {
        "forward": [(G, "X", "c"), (G, "W", "r")],
        "dX": [(G, "W", "r"), (R, "dX", "c")],
        "dW": [(G, "X", "c"), (R, "dW", "r"), (A, "dW", "k")],
        "db": [(A, "db", "k"), (A, "db", "r")],
    },
    "3d": {
        "forward": [(G, "X", "c"), (G, "W", "a"), (R, "Y", "b")],
        "dX": [(G, "dY", "b"), (G, "W", "a"), (R, "dX", "c")],
        "dW": [(G, "X", "c"), (R, "dW", "a")],
        "db": [(A, "db", "a")],
    },
    "axonn": {
        "forward": [(G, "W", "z"), (A, "Y", "x")],
        "dX": [(G, "W", "z"), (A, "dX", "y")],
        "dW": [(R, "dW", "z")],
        "db": [(A, "db", "z")],
    },
    "fsdp_tp_sequence": {
        "forward": [(G, "X", "tp"), (G, "W", "dp")],
        "dX": [(G, "W", "dp"), (R, "dX", "tp")],
        "dW": [(G, "X", "tp"), (R, "dW", "dp")],
        "db": [(A, "db", "dp")],
    },
    "expert": {"db": [(A, "db", "ep")]},
    "column_wx": {"dX": [(A, "dX", "tp")], "db": [(A, "db", "tp")]},
}


@pytest.mark.parametrize("name", TABLE)
def test_the_published_schemes_communicate_as_published(name: str) -> None:
    layout = PRESETS[name]
    sizes = dict.fromkeys(layout.letters, 8)
    found: dict[str, list[tuple[str, str, str]]] = {}
    for entry in layout.collectives(sizes, dict.fromkeys(layout.axes, 2), bias=True):
        found.setdefault(entry.phase, []).append((entry.operation, entry.tensor, entry.axis))
    assert found == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_explain_tells_every_collective_in_its_phase(name: str) -> None:
    told: dict[str, list[str]] = {}
    phase = ""
    for line in PRESETS[name].explain().split("\n")[2:]:
        if line and not line.startswith(" "):
            phase = line.split(",")[0]
        told.setdefault(phase, []).append(" ".join(line.split()))
    for expected_phase, operations in TABLE[name].items():
        for operation, tensor, axis in operations:
            assert any(f"{operation} {tensor} over {axis}" in line for line in told[expected_phase]), told
    quiet = [p for p in ("forward", "dX", "dW", "db") if p not in TABLE[name] and p in told]
    for phase in quiet:
        assert "no communication" in told[phase]


def test_explain_writes_formulas_bias_and_marks() -> None:
    text = Layout(
        "X[n/tp,d] W[d,m/tp]{dp} -> Y[n,m/tp]".replace("X[n/tp", "X[n/dp/tp").replace("Y[n,", "Y[n/dp,")
    ).explain()
    assert "compute     dX[n/dp,d] = Σ_m dY[n/dp,m/tp] W[d,m/tp]" in text
    assert "leave       dW partial over dp: the caller sums it" in text
    assert "db, if a bias B[m/tp] is added" in text
    row = Layout("X[n,d/tp] W[d/tp,m] -> Y[n/tp,m] + B[m]").explain()
    assert "add         B[m], once, after the reduction" in row
    assert "compute     db = Σ_n dY[n,m] (as gathered above)" in row
    assert "Y lacks it, so Y is what is communicated along tp (stores tp on n)" in row
    assert "no axis: every rank computes the whole product" in Layout("X[n,d] W[d,m] -> Y[n,m]").explain()
    marked = Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp} + B[m]").explain()
    assert "by the first rank of tp, since the sum is left to the caller" in marked
