"""The other ranks as processes of this host: at work, stopped, or gone. Ranks of other hosts are not seen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

STOPPED_S = 12.0
"""How long a rank may be stopped (by SIGSTOP, a debugger, a terminal's Ctrl-Z) before it counts as frozen."""

ENDED = "ZXx"
"""The letters of `stat` that say that a process has ended, whether its parent has asked for how or not."""


@dataclass(frozen=True)
class Process:
    """A process, also for those who have no descriptor of it.

    started: when, in the kernel's ticks: another process that got the same number later started later.
    place: what processes must share to see each other: a running kernel and a process namespace. Empty where there is
        no /proc.
    """

    pid: int
    started: int
    place: tuple[str, str] | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(read: Mapping[str, Any]) -> Process:
        return Process(int(read["pid"]), int(read["started"]), tuple(read["place"]) if read["place"] else None)

    def state(self) -> Literal["at work", "stopped", "gone"]:
        """What /proc says; a process of this host alone may be asked."""
        letter, started = stat(self.pid)
        if started != self.started or letter in ENDED:
            return "gone"
        return "stopped" if letter in "Tt" else "at work"


def this_process() -> Process:
    pid = os.getpid()
    return Process(pid, stat(pid)[1], place())


def place() -> tuple[str, str] | None:
    """Names the running kernel and the process namespace that this process is in; None without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


class Processes:
    """Watches the processes of ranks; those of other hosts count as being at work.

    of: by rank, as the program numbers them.
    """

    def __init__(self, of: Mapping[int, Process]) -> None:
        here = place()
        self._of = {rank: one for rank, one in of.items() if here is not None and one.place == here}
        self._stopped: dict[int, float] = {}

    def sees(self, rank: int) -> bool:
        """Whether a rank is of this host."""
        return rank in self._of

    def gone(self, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if rank in self._of and self._of[rank].state() == "gone"]

    def trouble(self, ranks: Iterable[int]) -> str:
        """Which of these ranks will not come, in words; empty if all may. To be asked again and again while waiting:
        from the first time that it sees a rank stopped, it counts."""
        said = []
        now = time.monotonic()
        for rank in ranks:
            process = self._of.get(rank)
            state = "at work" if process is None else process.state()
            if process is not None and state == "gone":
                said.append(f"rank {rank} (process {process.pid}) died")
            if state != "stopped":
                self._stopped.pop(rank, None)
            elif process is not None and now - self._stopped.setdefault(rank, now) >= STOPPED_S:
                said.append(
                    f"rank {rank} (process {process.pid}) has been stopped for {now - self._stopped[rank]:.0f} s (by "
                    f"SIGSTOP, Ctrl-Z or a debugger; `kill -CONT {process.pid}` lets it go on)"
                )
        return "; ".join(said)


def stat(pid: int) -> tuple[str, int]:
    """The letter of a process's state, and when it started; ("X", 0) if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return "X", 0
    fields = text[text.rindex(b")") + 2 :].split()  # the name before it may hold anything
    return chr(fields[0][0]), int(fields[19])
