"""Layouts of wrong text: each is read and derived, or refused by an error of shardgrad's, not longer than a page."""

from __future__ import annotations

import random

from shardgrad.chaos.tally import Row, Tally
from shardgrad.errors import LayoutError, MeshError, ShapeError, shorten
from shardgrad.layout.layout import Layout
from shardgrad.layout.presets import PRESETS

_OURS = (LayoutError, ShapeError, MeshError)
_MOST = 4_000
_PARTS = [*"XWYB[]{}()/,:+| \nndm_0é\0\u202e", "->", "tp", "dp", "-1", "X[n,d]", "W[d,m/tp]", "/tp", "{tp}", "n" * 600]
_MESHES: tuple[dict[str, int], ...] = (
    {"tp": 2},
    {"tp": 3, "dp": 2},
    {"z": 2, "x": 2, "y": 2},
    {},
    {"tp": 0},
    {"tp": -1},
)


def run(seed: int, count: int) -> list[Row]:
    """Try `count` texts, alike for one seed: presets with some letters or parts put in, left out or exchanged."""
    chance = random.Random(seed)
    texts = [str(layout) for layout in PRESETS.values()]
    tally = Tally(("letters", "parts"))
    for _ in range(count):
        kind = chance.choice(("letters", "parts"))
        text = chance.choice(texts)
        for _ in range(chance.choice((1, 1, 2, 5))):
            text = _mutated(chance, text, kind)
        failure = _failure(text, chance.choice(_MESHES), {"n": chance.choice((5, 0, -1)), "d": 3, "m": 4})
        tally.note(kind, failure and f"{shorten(text)!r}: {failure}")
    return tally.rows


def _mutated(chance: random.Random, text: str, kind: str) -> str:
    at = chance.randrange(len(text) + 1)
    if kind == "parts":
        return text[:at] + chance.choice(_PARTS) + text[at + chance.choice((0, 0, 1, 4)) :]
    other = chance.randrange(len(text) + 1)
    low, high = min(at, other), max(at, other)
    return chance.choice((text[:low] + text[low + 1 :], text[:high] + text[low:], text[:low] + text[high:]))


def _failure(text: str, mesh: dict[str, int], sizes: dict[str, int]) -> str | None:
    """What is wrong with how a text ended."""
    try:
        layout = Layout(text)
        layout.program(mesh)
        layout.resolve(sizes, mesh)
        layout.collectives(sizes, mesh)
    except _OURS as error:
        return f"a message of {len(str(error))} characters" if len(str(error)) > _MOST else None
    except Exception as error:
        return f"{type(error).__name__}: {shorten(str(error))}"
    return None
