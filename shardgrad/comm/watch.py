"""Ends a rank when another will never go on, whatever this one waits in: a collective, the store, torch's own start.

Every rank of a job has a thread that looks at the processes of its host, at the store, and, for ranks of other hosts,
at a beat that each rank leaves in the store. The program has some seconds to find out by itself, and say more.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from shardgrad.comm.ask import SILENT_S, Question, silent_store
from shardgrad.comm.processes import Process, Processes

_LOOK_S = 1.0
_ITSELF_S = 5.0  # how long the program is left to find out by itself
_BEAT_S = 20.0  # without a beat in so long, a rank of another host counts as frozen


class Watch:
    """Of one rank, until `leave`.

    store: of which this makes a connection of its own, for a question to a store waits for the one before it.
    processes: of all ranks. end: what ends this process, with a message.
    """

    def __init__(
        self, store: Any, rank: int, processes: Mapping[int, Process], end: Callable[[str], None] | None = None
    ) -> None:
        self._rank, self._end = rank, end or _end_process
        self._processes = Processes(processes)
        self._mates = [other for other in processes if other != rank and self._processes.sees(other)]
        following = (rank + 1) % len(processes)  # of the ranks elsewhere, each is watched by the one before it
        watched = following if following != rank and following not in self._mates else None
        self._board = _Board(store.clone(), rank, watched)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardgrad-watch", daemon=True)
        if len(processes) > 1:
            self._thread.start()

    def tell(self, why: str) -> None:
        """This rank ends before the others, which are to end too, and say why."""
        if self._thread.is_alive():
            self._over.set()
            self._board.write("ended", json.dumps({"rank": self._rank, "why": why}))

    def heard(self) -> str:
        """What another rank has told of its end; empty if none has, or the store does not say."""
        return self._board.ended() if self._thread.is_alive() else ""

    def leave(self) -> None:
        """This rank ends as it should: nobody is to miss it."""
        if self._thread.is_alive():
            self._over.set()
            self._board.write(f"left {self._rank}", "yes")

    def _run(self) -> None:
        since: float | None = None
        last = time.monotonic()
        while not self._over.wait(_LOOK_S):
            now = time.monotonic()
            if now - last > 5 * _LOOK_S:  # this rank was stopped itself: what it has not seen says nothing
                self._board.forget()
                since = None
            last = now
            suspects = self._processes.gone(self._mates)
            self._board.look(suspects)
            others = [rank for rank in self._mates if rank not in self._board.left]
            why = self._processes.trouble(others) or self._board.trouble()
            since = None if not why else now if since is None else since
            if since is not None and now - since >= _ITSELF_S:
                self._end(f"rank {self._rank} ends, for it cannot go on: {why}")
                return


class _Board:
    """What ranks leave for each other in the store. Asked again and again, it never waits.

    watched: the rank whose beat counts, if any. left: of the ranks asked for, those that have ended as they should.
    """

    def __init__(self, store: Any, rank: int, watched: int | None) -> None:
        self._store, self._rank, self._watched = store, rank, watched
        self.left: set[int] = set()
        self._ended = self._gone = self._beat = ""
        self._beats = 0
        self.forget()

    def forget(self) -> None:
        """Begin to count anew how long there has been no answer and no beat."""
        self._question: Question[None] | None = None
        self._changed = time.monotonic()

    def write(self, key: str, text: str) -> None:
        """The first that writes a key counts."""
        Question(lambda _: self._store.compare_set(key, "", text)).wait(_ITSELF_S)

    def look(self, suspects: list[int]) -> None:
        """Take in what has been answered, and ask again."""
        if self._question is not None and self._question.wait(0.0):
            try:
                self._gone = self._question.answer or ""
            except RuntimeError as error:
                self._gone = str(error)
            self._question = None
        if self._question is None:
            self._question = Question(lambda _: self._read(suspects))

    def ended(self) -> str:
        """What a rank has told of its end; this waits for the answer, but not for long."""
        question = Question(lambda _: self._read_ended())
        with contextlib.suppress(RuntimeError):
            return question.answer if question.wait(_ITSELF_S) else ""
        return ""

    def trouble(self) -> str:
        """Why this rank cannot go on, as far as the store says; empty if it says nothing."""
        if self._question is not None and time.monotonic() - self._question.heard > SILENT_S:
            return silent_store(SILENT_S)
        if self._watched is not None and self._watched not in self.left and not self._gone:
            still = time.monotonic() - self._changed
            if still > _BEAT_S:
                return (
                    f"rank {self._watched}, on another host, has given no sign for {still:.0f} s: its host is down or "
                    "cut off, or it is stopped"
                )
        return self._ended or self._gone

    def _read(self, suspects: list[int]) -> None:
        store = self._store
        self._beats += 1
        store.set(f"beat {self._rank}", str(self._beats))
        self._ended = self._read_ended()
        if self._watched is not None and store.check([f"beat {self._watched}"]):
            beat = store.get(f"beat {self._watched}").decode()
            if beat != self._beat:
                self._beat, self._changed = beat, time.monotonic()
            suspects = [*suspects, self._watched]
        self.left |= {rank for rank in suspects if store.check([f"left {rank}"])}

    def _read_ended(self) -> str:
        if not self._store.check(["ended"]):
            return ""
        ended = json.loads(self._store.get("ended"))
        return f"rank {ended['rank']} has ended: {ended['why']}"


def _end_process(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
