"""What has been found, and the collectives that nobody has waited for yet."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from .memory import Bytes, overlap
from .order import Launch
from .place import Place, here
from .stuck import Count

MOST_LAUNCHES = 50_000
"""So many of a rank's last collectives are compared with the other ranks' orders."""


class RaceError(RuntimeError):
    """A program breaks NCCL's contract; `findings` are what was seen, each with its lines."""

    def __init__(self, text: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(text)
        self.findings = list(findings)


class Open(Protocol):
    """What nobody has waited for, as `check_use` reads it."""

    what: str
    started: Place
    outs: list[Tensor]
    kept: list[tuple[Tensor, Bytes]]
    named: set[str]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault.

    kind: "read before wait", "written before wait", "changed before wait", "freed before wait", "dropped",
        "refused by NCCL", "order of ranks", "never called".
    what: the fault in a sentence. started, used: where the collective was started, and where the fault is.
    """

    kind: str
    what: str
    started: Place | None = None
    used: Place | None = None

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.what}"]
        if self.started is not None:
            lines.append(f"    started at {self.started}")
        if self.used is not None:
            lines.append(f"    {'here' if self.started is None else 'used at'} {self.used}")
        return "\n".join(lines)


@dataclass(eq=False)
class Report:
    """The findings of one block of a program on this rank, each once.

    collectives: how many were started. notes: what could not be checked.
    """

    findings: list[Finding] = field(default_factory=list)
    collectives: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        same = (finding.kind, finding.started, finding.used)
        if all((f.kind, f.started, f.used) != same or f.used is None for f in self.findings):
            self.findings.append(finding)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings), *(f"note: {note}" for note in self.notes)])


class Ledger:
    """What one process has under way, over all of its groups, and where its findings go.

    reports: of the blocks that watch, the innermost last. launches: in the program's order. counts: of what has been
        started: collectives, by group, and messages sent, by group, sender and receiver.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.open: dict[int, Open] = {}
        self.reports: list[Report] = []
        self.counts: dict[Count, int] = {}
        self.launches: deque[Launch] = deque(maxlen=MOST_LAUNCHES)

    def forget_counts(self, group: str) -> None:
        """Begin anew with a group's name."""
        for count in [one for one in self.counts if one[0] == group]:
            del self.counts[count]

    def find(self, finding: Finding) -> None:
        """Note a fault for the end of the block; outside of all blocks it is raised at once.

        Raises:
            RaceError: outside of `late_watch`.
        """
        if not self.reports:
            raise RaceError(str(finding), [finding])
        self.reports[-1].add(finding)

    def find_later(self, finding: Finding) -> None:
        """As `find`, where nothing can be raised: outside of all blocks it is a warning."""
        if self.reports:
            self.reports[-1].add(finding)
        else:
            warnings.warn(str(finding), stacklevel=2)

    def check_use(self, by: str, x: Tensor, writes: bool, only_writes: bool = False) -> None:
        """Find whether a tensor is, or shares memory with, what a collective under way gives or has been given.

        by: what uses it, in words. writes: whether it changes it, beside or (`only_writes`) instead of reading it.
        """
        for pending in list(self.open.values()):
            if any(overlap(x, out) for out in pending.outs):
                kind, verb = ("written before wait", "writes to") if only_writes else ("read before wait", "reads")
                pending.named.add(kind)
                text = f"{by} {verb} what {pending.what} has not brought yet"
                self.find(Finding(kind, text, pending.started, here()))
            if writes and any(overlap(x, given) for given, _ in pending.kept):
                pending.named.add("changed before wait")
                text = f"{by} writes to what {pending.what} is still sending"
                self.find(Finding("changed before wait", text, pending.started, here()))


ledger = Ledger()
