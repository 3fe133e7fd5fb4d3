"""The other ranks of a group as processes: alive, gone from the group, or failed in it."""

from __future__ import annotations

import os
import select
import time

from shardgrad.comm.shm.segment import BROKEN, FAILED, LEFT, TEXT, Segment


class Peers:
    """Watches the processes of a group's ranks.

    names: the ranks as the program numbers them, which is how messages call them.
    """

    def __init__(self, segment: Segment, rank: int, pids: list[int], names: list[int]) -> None:
        self.segment, self.rank, self.pids, self.names = segment, rank, pids, names
        self.broken = segment.plan.word(0, BROKEN)  # the word that says whether any rank failed
        self._watch = select.poll()
        self._rank_of: dict[int, int] = {}
        self._dead: set[int] = set()
        for peer, pid in enumerate(pids):
            if peer == rank:
                continue
            try:
                # A descriptor of the process itself: it shows a death at once, also of a process that has not
                # been waited for yet, and cannot mean another process that got the same number later.
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self._dead.add(peer)
                continue
            self._rank_of[descriptor] = peer
            self._watch.register(descriptor, select.POLLIN)

    def gone(self, ranks: list[int]) -> str:
        """Which of these ranks will never come, in words; empty if all still may.

        The caller must look once more for what it waits for: a rank may have done its part and ended since.
        """
        for descriptor, _ in self._watch.poll(0):
            self._dead.add(self._rank_of[descriptor])
            self._watch.unregister(descriptor)
        said = []
        for rank in ranks:
            if rank == self.rank:
                continue
            if self.segment.words[self.segment.plan.word(rank, LEFT)]:
                said.append(f"rank {self.names[rank]} has left the group (destroy_process_group, or its end)")
            elif rank in self._dead:
                said.append(f"rank {self.names[rank]} (process {self.pids[rank]}) died")
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

    def close(self) -> None:
        for descriptor in self._rank_of:
            os.close(descriptor)
        self._rank_of.clear()
        self._watch = select.poll()
