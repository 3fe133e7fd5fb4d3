"""The table of types in docs/coming-from.md is the one that shardgrad tells spmd_types."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("spmd_types")
from shardgrad.verification.spmd_types import _PAIRS

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
ROW = re.compile(r"^\| `(\w+)` \| ([IRVP](?: or [IRVP])*) \| ([IRVP]) \|", re.MULTILINE)


def test_the_table_has_every_pair_with_its_types() -> None:
    written = {name: (before.split(" or "), after) for name, before, after in ROW.findall(PAGE.read_text())}
    assert written == {name: ([repr(kind) for kind in before], repr(after)) for name, (before, after) in _PAIRS.items()}
