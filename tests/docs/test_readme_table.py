"""README's table of known layouts: its layouts are the presets, and its collectives those that the rule derives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shardgrad as sg

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.splitlines()
    if re.match(r"^\| [^|]+ \| `\w+\[[^`]+->[^`]+` \|", line)
]
OPERATIONS = re.compile("all-gather|reduce-scatter|all-reduce")


def test_the_layouts_are_the_presets() -> None:
    assert sorted(row[1].strip("`") for row in ROWS) == sorted(map(str, sg.PRESETS.values()))


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_collectives_are_derived(row: list[str]) -> None:
    _, text, *cells = row
    layout = sg.Layout(text.strip("`"))
    sizes, mesh = dict.fromkeys(layout.letters, 24), dict.fromkeys(layout.axes, 2)
    lhs, rhs, bias = f"d{layout.lhs.name}", f"d{layout.rhs.name}", "db"
    # The table's X is what the rows are of; in Y = WX the second operand.
    phases = ("forward", rhs, lhs, bias) if layout.rhs.name == "X" else ("forward", lhs, rhs, bias)
    derived = layout.collectives(sizes, mesh, bias=True)
    for phase, cell in zip(phases, cells, strict=True):
        if "as 2D" in cell or "same" in cell:
            continue
        found = {(one.operation, one.axis) for one in derived if one.phase == phase}
        named = set(OPERATIONS.findall(cell)) or ({"all-reduce"} if cell.startswith("on ") else set())
        assert named == {operation for operation, _ in found}, phase
        for axis in re.findall(r"\bon (\w+)\b", cell):
            assert axis in {axis for _, axis in found}, phase
