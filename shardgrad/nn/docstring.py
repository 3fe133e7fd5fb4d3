"""The table in a layer's docstring: its layouts, and what forward, dX, dW and db send, read from the layouts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from shardgrad.layout.cost import Collective
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import parse

_SIZE = 4  # of every letter, on two ranks: what is sent does not depend on it


def with_products(doc: str, products: Sequence[str], lookup: str | None) -> str:
    """A docstring with the table of its lookup and products after its first paragraph."""
    summary, rest = [*inspect.cleandoc(doc).split("\n\n", 1), ""][:2]
    table = "\n".join(f"    {line}".rstrip() for line in table_of(products, lookup))
    return "\n\n".join(part for part in (summary, table, rest) if part)


def table_of(products: Sequence[str], lookup: str | None) -> list[str]:
    """Lines: each product's layout, and a line for each of its phases, with and without `sequence_dim`.

    lookup: a product whose first operand is not there, and has no gradient.
    """
    plain, sequence = (
        [*_columns([lookup] if lookup else [], rows, True), *_columns(products, rows)] for rows in ("", "/tp")
    )
    if plain == sequence:
        return [line for block in plain for line in _lines(block)]
    width = max(len(line) for block in plain for line in _lines(block)) + 3
    lines = [f"{'':{width}}with sequence_dim:"]
    for left, right in zip(plain, sequence):
        lines += [f"{a:{width}}{b[9:] if at else b}" for at, (a, b) in enumerate(zip(_lines(left), _lines(right)))]
    return lines


def phases(rows: Sequence[Collective]) -> dict[str, list[str]]:
    """What each phase sends, in words."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.phase, []).append(f"{row.operation} {row.tensor} over {row.axis}")
    return found


def _columns(products: Sequence[str], sequence: str, lookup: bool = False) -> list[tuple[str, dict[str, str]]]:
    """For each product its layout, and what each phase sends."""
    shared: set[str] = set()
    made = []
    for template in products:
        layout = Layout(template.replace("/sp", sequence))
        x = layout.lhs.name
        sizes = dict.fromkeys(layout.letters, _SIZE)
        rows = layout.collectives(sizes, {"tp": 2}, frozen=(x,) if lookup else ())
        if x in shared:  # its gather and the reduction of its gradient are those of the product before
            rows = [row for row in rows if row.tensor not in (x, f"d{x}")]
        names = ["forward", *([] if x in shared or lookup else [f"d{x}"]), f"d{layout.rhs.name}"]
        names += ["db"] if parse(template).bias is not None else []
        shared.add(x)
        sent = phases(rows)
        made.append((str(layout), {name: ", ".join(sent.get(name, ["–"])) for name in names}))
    return made


def _lines(block: tuple[str, dict[str, str]]) -> list[str]:
    layout, sent = block
    return [layout, *(f"{name:9}{what}" for name, what in sent.items())]
