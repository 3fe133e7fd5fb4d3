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


def chosen(only: str = "", dtypes: Sequence[str] = ()) -> Iterator[tuple[Kind, torch.dtype]]:
    """The kinds whose name contains a text, in each of their precisions that is among those asked for (none: in all)."""
    for kind in KINDS:
        for dtype in kind.dtypes:
            if only in kind.name and (not dtypes or str(dtype).removeprefix("torch.") in dtypes):
                yield kind, dtype


def try_one(kind: Kind, dtype: torch.dtype, mesh: DeviceMesh, seed: int = 0) -> Verdict:
    """Verify a right program, which must not be accused. An error counts as an accusation."""
    told = kind.name, str(dtype).removeprefix("torch."), mesh.size()
    try:
        report = verified(kind.make(mesh, dtype), seed)
    except Exception as error:  # of verify, or of the program: neither may be
        return Verdict(*told, ACCUSED, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if report.first is not None and not report.ok:
        found = tuple(fit.name for diagnosis in report.diagnoses for fit in diagnosis.fits)
        return Verdict(*told, ACCUSED, f"{report.first.kind} of {report.first.name}", found)
    unsure = [f"{row.kind} of {row.name}" for row in report.rows if row.verdict == CANNOT_TELL]
    return Verdict(*told, CANNOT_TELL if unsure else PASSES, ", ".join(unsure[:3]))


def mesh_of(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
