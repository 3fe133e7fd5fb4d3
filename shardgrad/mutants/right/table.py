"""The table of right programs, and what verification says of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardgrad.mutants.right import attention, data, heads, layers, mlps, norms, operations
from shardgrad.mutants.right.kind import Kind
from shardgrad.mutants.run import verified

KINDS: Sequence[Kind] = [
    one for room in (mlps, norms, attention, heads, data, operations, layers) for one in room.KINDS
]  # fmt: skip

PASSES, CANNOT_TELL, ACCUSED = "passes", "cannot tell", "ACCUSED"


@dataclass(frozen=True)
class Verdict:
    """What is said of one right program.

    said: PASSES, CANNOT_TELL or ACCUSED.
    of: the first tensor that is accused, or those of which it cannot be told; or the error that was raised.
    found: the explanations that were offered.
    """

    name: str
    dtype: str
    ranks: int
    said: str
    of: str = ""
    found: tuple[str, ...] = ()


def chosen(only: str) -> Iterator[tuple[Kind, torch.dtype]]:
    """The kinds whose name contains a text, in each of their precisions."""
    for kind in KINDS:
        for dtype in kind.dtypes:
            if only in kind.name:
                yield kind, dtype


def try_one(kind: Kind, dtype: torch.dtype, mesh: DeviceMesh) -> Verdict:
    """Verify a right program, which must not be accused. An error counts as an accusation."""
    told = kind.name, str(dtype).removeprefix("torch."), mesh.size()
    try:
        report = verified(kind.make(mesh, dtype), 0)
    except Exception as error:  # of verify, or of the program: neither may be
        return Verdict(*told, ACCUSED, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if report.first is not None and not report.ok:
        found = tuple(fit.name for diagnosis in report.diagnoses for fit in diagnosis.fits)
        return Verdict(*told, ACCUSED, f"{report.first.kind} of {report.first.name}", found)
    unsure = [f"{row.kind} of {row.name}" for row in report.rows if row.verdict == CANNOT_TELL]
    return Verdict(*told, CANNOT_TELL if unsure else PASSES, ", ".join(unsure[:3]))


def mesh_of(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))


def rows(found: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """The titles of a table's columns, and a row for each kind: what is said of it in each precision."""
    dtypes = list(dict.fromkeys(one.dtype for one in found))
    of = {(one.name, one.dtype): one for one in found}
    names = dict.fromkeys(one.name for one in found)
    return ["right program", *dtypes], [[name, *(_cell(of.get((name, dtype))) for dtype in dtypes)] for name in names]


def _cell(one: Verdict | None) -> str:
    if one is None:
        return ""
    said = f"{one.said}: {one.of}" if one.of else one.said
    return f"{said} ({', '.join(one.found)})" if one.found else said


def summary(found: Sequence[Verdict]) -> str:
    counts = {said: sum(one.said == said for one in found) for said in (PASSES, CANNOT_TELL, ACCUSED)}
    kinds = len({one.name for one in found})
    ranks = found[0].ranks if found else 0
    return (
        f"{kinds} kinds of right programs, {len(found)} runs on {ranks} ranks: {counts[PASSES]} pass, of "
        f"{counts[CANNOT_TELL]} it cannot be told, {counts[ACCUSED]} are accused."
    )
