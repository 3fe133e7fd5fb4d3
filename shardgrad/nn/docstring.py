"""The table in a layer's docstring: its layouts, and what forward, dX, dW and db send, read from the layouts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby

from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import parse
from shardgrad.layout.schedule import communication


def with_products(doc: str, products: Sequence[str], lookup: str | None = None) -> str:
    """A docstring with the table of a layer's products after its first paragraph, with and without `sequence_dim`.

    products: templates; those of one input stand together. lookup: a product whose first operand is never there.
    """
    summary, rest = [*inspect.cleandoc(doc).split("\n\n", 1), ""][:2]
    plain, sharded = _lines(products, lookup, ""), _lines(products, lookup, "/tp")
    width = max(map(len, plain)) + 3
    table = [f"{'':{width}}with sequence_dim:"]
    table += [f"{left:{width}}{right if '->' in right else right[9:]}" for left, right in zip(plain, sharded)]
    return "\n\n".join(part for part in (summary, "\n".join(f"    {line}" for line in table), rest) if part)


def _lines(products: Sequence[str], lookup: str | None, sequence: str) -> list[str]:
    """Layouts of one input, and below them a line for each phase of theirs."""
    lines = []
    for x, group in groupby([*([lookup] if lookup else []), *products], lambda template: parse(template).lhs):
        phases: dict[str, list[str]] = {"forward": [], f"d{x.name}": []}
        gathered: set[str] = set()
        for template in group:
            layout, biased = Layout(template.replace("/sp", sequence)), parse(template).bias is not None
            frozen = (x.name,) if template == lookup else ()
            rows = communication(layout.instructions(dict.fromkeys(layout.axes, 2), frozen=frozen))
            phases |= {f"d{layout.rhs.name}": [], **({"db": []} if biased else {})}
            for row in rows:
                if row.tensor not in gathered:  # else it is shared with the product before
                    phases[row.phase].append(f"{row.move.kind} {row.tensor} over {row.move.axis}")
            gathered |= {x.name, f"d{x.name}"}
            lines.append(str(layout))
        if frozen:
            phases.pop(f"d{x.name}")
        phases |= {"db": phases.pop("db")} if "db" in phases else {}  # after the last dW
        lines += [f"{phase:9}{', '.join(sent) or '–'}" for phase, sent in phases.items()]
    return lines
