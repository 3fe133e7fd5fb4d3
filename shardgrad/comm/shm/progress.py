"""A thread that moves asynchronous operations on while the program does not wait for them.

Collectives that the program waits for at once never need it: the calling thread does all the work. Nor do those of one
round: from when they are started the others have all they need. It is there for longer asynchronous ones, so that they
go on while the program computes (torch's kernels release the interpreter lock), so that a future is fulfilled, and so
that ranks that wait for several groups in different orders do not wait for ever.

It competes with the program for the interpreter, and for the core if there is none to spare (measured on 2 cores with 2
ranks, a step of 10 ms with two all-reduces of 256 KiB: 0.5 ms lost). So what was started just now is left to the
program, which will soon wait for it; only futures have the thread look at once.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref

from shardgrad.comm.shm.queue import Idle, Queue

_PAUSE_S = 0.001  # between looks at several groups that have nothing to move
_NAP_S = 0.001  # the longest sleep while there is something under way
_LINGER_S = 0.02  # how long to stay after the last operation, before the next one has to wake the thread


class Progress:
    """One for a process; the thread starts with the first asynchronous operation that could not end at once."""

    def __init__(self) -> None:
        self._queues: weakref.WeakSet[Queue] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self._stop = False

    def watch(self, queue: Queue, *, now: bool = False) -> None:
        """Move this queue on, until it is empty; now: look at it at once."""
        if now:
            self._hurry.set()
        with self._lock:  # in which the thread decides that nothing is left to watch
            if queue.watched and self._wake.is_set():
                return
            queue.watched = True
            self._queues.add(queue)
            self._wake.set()
            # After a fork the thread of the parent is not alive here.
            if self._thread is None or not self._thread.is_alive():
                self._stop = False
                self._thread = threading.Thread(target=self._run, name="shardgrad-shm", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """Before the interpreter ends: it must not pull the lock away from under a thread that is inside of torch."""
        self._stop = True
        self._wake.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stop:
            self._wake.wait()
            self._work()

    def _work(self) -> None:
        rest = time.monotonic() + _LINGER_S
        idle = Idle()
        while not self._stop:
            now = time.monotonic()
            with self._lock:
                busy = [queue for queue in self._queues if queue.busy()]
                if not busy and now > rest:
                    for queue in self._queues:
                        queue.watched = False
                    self._queues.clear()
                    self._wake.clear()
                    return
            if busy:
                rest = now + _LINGER_S
            free = {queue: queue.due_in() for queue in busy if not queue.waiters}
            mine = [queue for queue, seconds in free.items() if seconds <= 0]
            if not mine:
                self._hurry.wait(min(_LINGER_S, *free.values()) if free else _LINGER_S)
                self._hurry.clear()
            elif sum(queue.poll() for queue in mine):
                idle = Idle()
            elif idle.enough():
                for queue in mine:
                    queue.look()
                if len(mine) == 1:
                    mine[0].nap(_NAP_S)
                else:
                    time.sleep(_PAUSE_S)
            del busy, free, mine


progress = Progress()
atexit.register(progress.end)
