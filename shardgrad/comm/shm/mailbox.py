"""Rounds: write your slot, publish, wait until all ranks have published, read their slots.

A rank has two slots and uses them in turn. That needs no acknowledgement: a rank publishes round k+1 only when it has
read round k, and all ranks wait for all in each round, so when round k+1 is complete no rank reads round k any
more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shardgrad.comm.shm import futex
from shardgrad.comm.shm.segment import BELL, HEADER, POSTED, SLEEPING, SLOT, Segment

_MANY_VIEWS = 1024


class Mailbox:
    """One rank's view of the slots of all.

    round: the number of the round that this rank is in; the slots of odd and of even rounds alternate.
    moves: counts everything that this rank has done, to distinguish an idle look from a useful one.
    """

    def __init__(self, segment: Segment, rank: int) -> None:
        self.segment, self.rank, self.ranks = segment, rank, segment.plan.ranks
        self.words = segment.words
        self.round = 0
        self.moves = 0
        plan = segment.plan
        self.others = [r for r in range(self.ranks) if r != rank]
        self.posted = [plan.word(r, POSTED) for r in self.others]
        self._my_posted = plan.word(rank, POSTED)
        self._my_bell, self._my_sleeping = plan.word(rank, BELL), plan.word(rank, SLEEPING)
        self.bells = [(plan.word(r, SLEEPING), plan.word(r, BELL)) for r in self.others]
        self._rings = 0
        self._counting = threading.Lock()  # several threads of this rank may sleep
        self._headers = [[plan.header(parity, r) for r in range(self.ranks)] for parity in (0, 1)]
        self._views: dict[tuple[int, int, torch.dtype, int, int], Tensor] = {}

    def slot(self, rank: int, dtype: torch.dtype, start: int, count: int, ahead: int = 0) -> Tensor:
        """`count` elements from byte `start` of a rank's slot of this round (or of the next one: ahead=1)."""
        parity = (self.round + ahead) & 1
        key = (parity, rank, dtype, start, count)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MANY_VIEWS:
                self._views.clear()
            at = self.segment.plan.slot(parity, rank) + start
            assert start + count * dtype.itemsize <= SLOT
            view = self._views[key] = self.segment.bytes[at : at + count * dtype.itemsize].view(dtype)
        return view

    def places(self, dtype: torch.dtype, shape: torch.Size) -> tuple[list[Tensor], list[Tensor]]:
        """The beginnings of all ranks' slots as tensors, of even and of odd rounds."""
        size, plan = shape.numel() * dtype.itemsize, self.segment.plan
        assert size <= SLOT
        starts = [[plan.slot(parity, rank) for rank in range(self.ranks)] for parity in (0, 1)]
        even, odd = ([self.segment.bytes[at : at + size].view(dtype).view(shape) for at in row] for row in starts)
        return even, odd

    def splits(self, rank: int) -> list[int]:
        """What a rank says that it sends to each rank, in this round."""
        start = self.segment.plan.split(self.round & 1, rank)
        return self.words[start : start + self.ranks].tolist()

    def say_splits(self, counts: list[int]) -> None:
        start = self.segment.plan.split(self.round & 1, self.rank)
        for offset, count in enumerate(counts):
            self.words[start + offset] = count

    def say(self, header: bytes) -> None:
        start = self._headers[self.round & 1][self.rank]
        self.segment.raw[start : start + len(header)] = header

    def publish(self) -> None:
        futex.fence()  # the data, also by non-temporal stores, before the word that announces it
        self.words[self._my_posted] = self.round + 1
        self.ring()

    def odd_one(self, header: bytes) -> tuple[int, str] | None:
        """The first rank whose operation is not this one, and what it says it does."""
        raw, starts, length = self.segment.raw, self._headers[self.round & 1], len(header)
        for rank in self.others:
            start = starts[rank]
            if raw[start : start + length] != header:
                return rank, bytes(raw[start : start + HEADER]).partition(b"\0")[0].decode(errors="replace")
        return None

    def comes(self, word: int, seconds: float) -> bool:
        """Look for so long, without pause, whether another rank publishes this round."""
        words, current, until = self.words, self.round, time.perf_counter() + seconds
        while words[word] <= current:
            if time.perf_counter() > until:
                return False
        return True

    def late(self) -> list[int]:
        """The ranks that have not published this round."""
        return [rank for rank, word in zip(self.others, self.posted) if self.words[word] <= self.round]

    fence = staticmethod(futex.fence)

    def ring(self) -> None:
        """Wake the ranks that sleep. After the news is stored, and before the sleepers are looked up, comes a fence: a
        rank that goes to sleep does both in the other order, so that one of the two sees the other."""
        futex.fence()
        for sleeping, bell in self.bells:
            if self.words[sleeping]:
                self.wake(bell)

    def wake(self, bell: int) -> None:
        # A value that this bell never had: were the sleeper's expected value written twice, it could miss a ring.
        self._rings += 1
        self.words[bell] = (self._rings * self.ranks + self.rank) & 0x7FFFFFFF
        futex.wake(self.segment.address + 8 * bell)

    def sleep(self, seconds: float, useless: Callable[[], bool]) -> None:
        """Sleep until another rank rings, if looking once more (`useless`) finds nothing to do."""
        expected = self.words[self._my_bell]
        with self._counting:
            self.words[self._my_sleeping] += 1
        try:
            futex.fence()
            if useless():
                futex.wait(self.segment.address + 8 * self._my_bell, expected, seconds)
        finally:
            with self._counting:
                self.words[self._my_sleeping] -= 1
