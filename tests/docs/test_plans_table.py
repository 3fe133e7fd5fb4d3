"""The table of known plans in docs/write-a-plan.md is shardgrad's. Run as a script, this file writes it anew."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from shardgrad.models.architectures import KNOWN, Architecture

PAGE = Path(__file__).parents[2] / "docs" / "write-a-plan.md"
TABLE = re.compile(r"(?<=\| architectures \| stored as \| sequence \|\n\|---\|---\|---\|\n)(\|.*\n)*")
SIZES = {"num_attention_heads": 4, "hidden_size": 16, "num_heads": 4, "d_kv": 4, "num_hidden_layers": 0}


def table() -> str:
    """A row for each architecture, with all of the types that share its plan."""
    types: dict[object, list[str]] = {}
    for kind, made in KNOWN.items():
        types.setdefault(made, []).append(kind)
    rows = []
    for kinds in types.values():
        known = KNOWN[kinds[0]](SimpleNamespace(**SIZES))
        sequence = known.sequence if isinstance(known.sequence, str) else "yes"
        rows.append(f"| {', '.join(f'`{kind}`' for kind in kinds)} | {stored(known)} | {sequence} |\n")
    return "".join(rows)


def stored(known: Architecture) -> str:
    """Texts, each with the names of what is stored so; of names with one parent, the last part alone."""
    names: dict[str, list[str]] = {}
    for pattern, text in known.plan.items():
        names.setdefault(text, []).append(pattern.removeprefix("**."))
    return "; ".join(f"`{text}`: {shortened(found)}" for text, found in names.items())


def shortened(names: list[str]) -> str:
    parents = ["", *(name.rpartition(".")[0] for name in names)]
    said = [
        name.rpartition(".")[2] if here and here == above else name
        for name, above, here in zip(names, parents, parents[1:])
    ]
    return ", ".join(f"`{name}`" for name in said)


def test_the_page_has_the_plans_of_the_code() -> None:
    (written,) = [match[0] for match in TABLE.finditer(PAGE.read_text(encoding="utf-8"))]
    assert written == table()


def test_the_page_on_training_names_them_all() -> None:
    page = (PAGE.parent / "models.md").read_text(encoding="utf-8")
    assert f"configurations: {', '.join(KNOWN)} (" in " ".join(page.split())


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
