"""The other ranks of a group: at work, stopped, dead, gone from the group, or failed in it."""

from __future__ import annotations

import time

from shardgrad.comm.processes import Processes
from shardgrad.comm.shm.segment import BROKEN, FAILED, LEFT, TEXT, Segment


class Peers:
    """Watches the processes of a group's ranks.

    processes: by the ranks as the program numbers them. names: those numbers, in the group's order.
    """

    def __init__(self, segment: Segment, rank: int, processes: Processes, names: list[int]) -> None:
        self.segment, self.rank, self.names = segment, rank, names
        self.broken = segment.plan.word(0, BROKEN)  # the word that says whether any rank failed
        self._processes = processes

    def gone(self, ranks: list[int]) -> str:
        """Which of these ranks will never come, in words; empty if all still may.

        The caller must look once more for what it waits for: a rank may have done its part and ended since.
        """
        others = [rank for rank in ranks if rank != self.rank]
        left = [rank for rank in others if self.segment.words[self.segment.plan.word(rank, LEFT)]]
        said = [f"rank {self.names[rank]} has left the group (destroy_process_group, or its end)" for rank in left]
        if trouble := self._processes.trouble(self.names[rank] for rank in others if rank not in left):
            said.append(trouble)
        return "; ".join(said)

    def leave(self) -> None:
        self.segment.words[self.segment.plan.word(self.rank, LEFT)] = 1

    def fail(self, text: str) -> None:
        """Tell the others why this rank gave the group up."""
        raw = text.encode()[: TEXT - 8]
        plan, words = self.segment.plan, self.segment.words
        start = plan.texts + self.rank * TEXT
        self.segment.raw[start + 8 : start + 8 + len(raw)] = raw
        words[start // 8] = len(raw)
        words[plan.word(self.rank, FAILED)] = time.monotonic_ns()  # one clock for all processes of a host
        words[self.broken] = 1

    def failure(self) -> str:
        """What the rank that failed first said, or an empty text."""
        plan, words = self.segment.plan, self.segment.words
        failed = [(words[plan.word(r, FAILED)], r) for r in range(plan.ranks) if words[plan.word(r, FAILED)]]
        if not failed:
            return ""
        rank = min(failed)[1]
        start = plan.texts + rank * TEXT
        return bytes(self.segment.raw[start + 8 : start + 8 + words[start // 8]]).decode(errors="replace")
