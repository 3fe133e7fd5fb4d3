"""The operations of a group on their way, and how to wait for one.

Collectives move on one after another, in the order in which they were started, which is the same on all ranks; messages
between two ranks move on independently. A thread that waits moves things on itself: a small all-reduce is then a few
stores and loads in the calling thread. Operations that no thread waits for are moved on by the thread of `progress`.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.shm.collectives import Meeting, WrongSplit
from shardgrad.comm.shm.errors import ShmError
from shardgrad.comm.shm.mailbox import Mailbox
from shardgrad.comm.shm.pairs import Pairs, Receiving, Sending
from shardgrad.comm.shm.peers import Peers

_SPIN_S = 100e-6  # how long a rank that has a core of its own looks without pause
_YIELDS = 4, 200  # then how often it lets others run, without and with a core of its own
_NAP_S = (0.001, 0.02)  # then how long it sleeps at a time, unless woken
_AS_IT_IS = nullcontext()
_LOOK_S = 0.1  # how often it looks whether the others live
_LOOK_FURTHER_S = 2.0  # how long it waits before it asks what is more than a look, and again
_YOUNG_S = 0.001  # how long what was started is left to the program, before the thread of `progress` moves it on
_YOUNG_ALONE_S = 0.1  # the same for a collective if that thread has no core to itself: it would only be in the way


class Ticket:
    """One operation on its way.

    what: in words. deadline: on the monotonic clock. results: torch's result of the work. outputs: tensors that are not
    contiguous, with the contiguous ones that stand in for them. source: of a message received, its sender.
    operation: of a collective, what it does.
    """

    __slots__ = (
        "callbacks",
        "deadline",
        "done",
        "error",
        "inference",
        "operation",
        "outputs",
        "queue",
        "results",
        "source",
        "started",
        "timeout",
        "what",
    )

    def __init__(
        self,
        queue: Queue,
        what: str,
        timeout: float,
        results: list[Tensor],
        outputs: list[tuple[Tensor, Tensor]],
        operation: Meeting | None = None,
    ) -> None:
        self.queue, self.operation = queue, operation
        self.what, self.timeout, self.results, self.outputs = what, timeout, results, outputs
        self.started = time.monotonic()
        self.deadline = self.started + timeout
        self.done = False
        self.error: BaseException | None = None
        self.callbacks: list[Callable[[], None]] = []
        self.source = -1
        self.inference = any(t.is_inference() for t in results)

    @property
    def given(self) -> bool:
        """Whether the other ranks have all that they need from this one, so that none is held up if no thread here
        moves the operation on."""
        return self.done or (self.operation is not None and self.operation.given)

    def wait(self, timeout: float | None = None) -> None:
        """Until the operation is done.

        Raises:
            ShmError: it failed, or took too long.
        """
        if not self.done and self.error is None:
            self.queue.wait(self, timeout)
        if self.error is not None:
            raise ShmError(str(self.error)) from self.error


class Queue:
    """What one rank has under way in one group. timeout: seconds that an operation may take that says nothing else."""

    def __init__(self, box: Mailbox, peers: Peers, label: str, timeout: float) -> None:
        self.box, self.peers, self.label, self.timeout = box, peers, label, timeout
        self.pairs = Pairs(box, peers.names)
        self.watched = False  # by the progress thread
        self.waiters = 0  # threads that are waiting and so moving things on themselves
        self.broken = ""
        self.inherited = False
        self.look_further: Callable[[str], str] = lambda _: ""
        self._me = peers.names[peers.rank]
        self._tickets: deque[Ticket] = deque()
        self._messages: set[Ticket] = set()
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self.settling = threading.RLock()  # of futures; their callbacks run inside
        self._looked = self._looked_further = 0.0
        cores = len(os.sched_getaffinity(0))
        self._spin, self._yields = (0.0, _YIELDS[0]) if cores < box.ranks else (_SPIN_S, _YIELDS[1])
        self._young = _YOUNG_S if cores > box.ranks * torch.get_num_threads() else _YOUNG_ALONE_S

    # Starting

    def start(self, ticket: Ticket, *, awaited: bool) -> None:
        """Begin a collective, and move on what can be moved on at once; awaited: and what others soon let move on."""
        with self._lock:
            self._refuse_if_broken(ticket.what)
            self._tickets.append(ticket)
        self.poll(self._spin if awaited else 0.0)

    def begin(self, operation: Meeting, result: Tensor, timeout: float, *, awaited: bool) -> Ticket | None:
        """`start`, but None if the operation has ended already: where nothing else is under way and the other ranks are
        there, it needs no ticket."""
        patience = self._spin if awaited else 0.0
        failed: list[Ticket] = []
        with self._lock:
            self._refuse_if_broken(operation.what)
            try:
                if not self._tickets and self._step(operation, patience):
                    return None
                ticket = Ticket(self, operation.what, timeout, [result], [], operation)
                self._tickets.append(ticket)
            except Exception as error:
                ticket = Ticket(self, operation.what, timeout, [result], [], operation)
                self._tickets.append(ticket)
                failed = self._fail(error)
            except BaseException as error:  # what is published must not be forgotten
                self._fail(error)
                raise
        self._call_back(failed)
        if not operation.posted:  # something was under way
            self.poll(patience)
        return ticket

    def send(self, ticket: Ticket, target: int, data: Tensor, tag: int, dtype: bytes) -> None:
        with self._lock:
            self._refuse_if_broken(ticket.what)
            self._messages.add(ticket)
            self.pairs.send(target, Sending(ticket, data, tag, dtype))
        self.poll()

    def receive(self, ticket: Ticket, source: int, target: Tensor, tag: int, dtype: bytes) -> None:
        with self._lock:
            self._refuse_if_broken(ticket.what)
            self._messages.add(ticket)
            try:
                there = self.pairs.receive(Receiving(ticket, target, source, tag, dtype))
            except ShmError as error:
                self._fail(error)
                raise
            finished = [ticket] if there else []
            self._finish(finished)
        self._call_back(finished)
        self.poll()

    def _refuse_if_broken(self, what: str) -> None:
        if not self.broken and self.box.words[self.peers.broken]:
            self.broken = self.peers.failure()
        if self.broken:
            raise ShmError(f"rank {self._me}: {what} is refused, for {self.label} is broken: {self.broken}")

    # Moving on

    def busy(self) -> bool:
        return bool(self._tickets or self._messages)

    def due_in(self) -> float:
        """Seconds until something that is under way should not be left to the program any longer; inf if nothing is."""
        now, soonest = time.monotonic(), math.inf
        for tickets, young in ((tuple(self._tickets), self._young), (tuple(self._messages), _YOUNG_S)):
            for ticket in tickets:
                soonest = min(soonest, 0.0 if ticket.callbacks else ticket.started + young - now)
        return soonest

    def poll(self, patience: float = 0.0) -> bool:
        """Move on whatever can be moved on, if other ranks let it wait no longer than so many seconds at a time;
        whether anything was."""
        if not self._lock.acquire(False):
            return False  # another thread is at it
        finished: list[Ticket] = []
        before = self.box.moves
        try:
            if shim.dispatch_mode_active():
                with shim.no_dispatch():
                    self._move(finished, patience)
            else:
                self._move(finished, patience)
        finally:
            self._lock.release()
        if finished:
            self._call_back(finished)
        return self.box.moves != before

    def _move(self, finished: list[Ticket], patience: float) -> None:
        try:
            while self._tickets and self._moved(self._tickets[0], patience):
                ticket = self._tickets.popleft()
                ticket.done = True
                finished.append(ticket)
            if self._messages:
                done = self.pairs.move()
                self._finish(done)
                finished += done
        except BaseException as error:
            finished += self._fail(error)
            if not isinstance(error, Exception):
                raise

    def _moved(self, ticket: Ticket, patience: float) -> bool:
        """Move a collective on; whether it has ended."""
        assert ticket.operation is not None
        with torch.inference_mode() if ticket.inference else _AS_IT_IS:
            if not self._step(ticket.operation, patience):
                return False
            for output, stand_in in ticket.outputs:
                output.copy_(stand_in.view(output.shape))
            return True

    def _step(self, operation: Meeting, patience: float) -> bool:
        """Move on by rounds, waiting for other ranks so many seconds at a time; whether all are over."""
        box = self.box
        words = box.words
        while True:
            i, current = operation.round, box.round
            if not operation.posted:
                operation.write(i, box)
                if i == 0:
                    box.say(operation.header)
                box.publish()
                operation.posted = True
            for word in box.posted:
                if words[word] <= current and not (patience and box.comes(word, patience)):
                    return False
            if i == 0 and (odd := box.odd_one(operation.header)) is not None:
                raise ShmError(self._disagreement(*odd, operation))
            operation.read(i, box)
            box.round = current + 1
            box.moves += 1
            operation.round, operation.posted = i + 1, False
            if i + 1 >= operation.rounds:
                return True

    def _finish(self, messages: list[Ticket]) -> None:
        for ticket in messages:
            for output, stand_in in ticket.outputs:
                output.copy_(stand_in.view(torch.uint8).view(output.dtype).view(output.shape))
            self._messages.discard(ticket)
            ticket.done = True

    def _call_back(self, finished: list[Ticket]) -> None:
        """Outside of the lock: a callback may start the next operation."""
        for ticket in finished:
            callbacks, ticket.callbacks = ticket.callbacks, []
            for callback in callbacks:
                callback()

    def _disagreement(self, rank: int, does: str, operation: Meeting) -> str:
        return (
            f"rank {self._me}: the ranks of {self.label} disagree: rank {self._me} does {operation.what}, "
            f"rank {self.peers.names[rank]} does {does}. All ranks must call the same collectives in the same order, "
            "with the same dtype and as many elements"
        )

    # Failing

    def _fail(self, error: BaseException) -> list[Ticket]:
        """Break the group: every operation under way ends with the error, here and on the other ranks."""
        if isinstance(error, WrongSplit):
            names = self.peers.names
            text = (
                f"rank {self._me}: in an all-to-all over {self.label} rank {names[error.sender]} sends {error.sent} "
                f"elements to rank {self._me}, which expects {error.expected}"
            )
        elif isinstance(error, ShmError):
            text = str(error)
        else:
            text = f"rank {self._me}: {type(error).__name__}: {error}"
        self.broken = text
        self.peers.fail(text)
        tickets = [*self._tickets, *self._messages]
        self._tickets.clear()
        self._messages.clear()
        self.pairs.clear()
        for ticket in tickets:
            ticket.error = error if isinstance(error, ShmError) else ShmError(text)
            ticket.operation = None
        for bell in (bell for _, bell in self.box.bells):
            self.box.wake(bell)
        return tickets

    def fail(self, text: str) -> None:
        with self._lock:
            tickets = self._fail(ShmError(text))
        self._call_back(tickets)

    def refuse_after_fork(self) -> None:
        """In a forked child: the rank's place in the group is its parent's, and what the child wrote would be taken for
        its parent's part of a sum."""
        self._lock, self.inherited = threading.Lock(), True  # a thread of the parent may have held the lock
        self._drop(
            "it is the group of the process that this one was forked from: use it there alone, or start this process "
            "with the method 'spawn' (of DataLoader: multiprocessing_context='spawn')"
        )

    def _drop(self, why: str) -> list[Ticket]:
        """Nothing moves any more, and nothing can be begun; the others are not told."""
        with self._lock:
            tickets = [*self._tickets, *self._messages]
            self._tickets.clear()
            self._messages.clear()
            self.pairs.clear()
            self.broken, self.look_further = why, lambda _: ""  # which may hold the group
            for ticket in tickets:
                ticket.error = ShmError(f"rank {self._me}: {ticket.what} over {self.label} was not finished: {why}")
        return tickets

    def close(self) -> None:
        """End: what is still under way fails here; ranks that wait for this one are notified."""
        if self.inherited:
            return
        self.peers.leave()
        tickets = self._drop("it was destroyed (destroy_process_group)")
        for bell in (bell for _, bell in self.box.bells):
            self.box.wake(bell)
        self._call_back(tickets)

    # Waiting

    def wait(self, ticket: Ticket, timeout: float | None) -> None:
        """Until an operation is done or has failed."""
        self.poll(self._spin)
        if ticket.done or ticket.error is not None:
            return
        if timeout is not None and time.monotonic() + timeout < ticket.deadline:
            ticket.deadline, ticket.timeout = time.monotonic() + timeout, timeout
        with self._counting:
            self.waiters += 1
        try:
            idle = Idle(self._yields)
            while not ticket.done and ticket.error is None:
                if self.poll(self._spin if idle.fresh else 0.0):
                    idle = Idle(self._yields)
                elif idle.enough():
                    self.look()
                    self.nap(idle.nap())
        finally:
            with self._counting:
                self.waiters -= 1

    def nap(self, seconds: float) -> None:
        """Sleep until another rank has done something, if there is nothing to do now."""
        self.box.sleep(seconds, lambda: self.busy() and not self.poll() and self.busy())

    def look(self) -> None:
        """Fail the group if an operation has taken too long, or will never end."""
        if failure := self.peers.failure():
            return self._fail_for(lambda: failure)
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            with self._lock:
                missing = self._missing()
            if self.peers.gone(missing):
                # Once more: it may have done its part before it went.
                self.poll()
                self._fail_for(self._why_gone)
            for ticket in tuple(self._tickets)[:1]:
                # Not to be asked at once, nor under the lock: it may take seconds.
                if now - max(ticket.started, self._looked_further) >= _LOOK_FURTHER_S:
                    self._looked_further = now
                    if why := self.look_further(ticket.what):
                        self._fail_for(lambda why=why: why)  # type: ignore[misc]
        if any(now > ticket.deadline for ticket in (*tuple(self._tickets), *tuple(self._messages))):
            self._fail_for(self._why_late)

    def _fail_for(self, why: Callable[[], str]) -> None:
        with self._lock:
            text = why() if self._tickets or self._messages else ""
            tickets = self._fail(ShmError(text)) if text else []
        self._call_back(tickets)

    def _current(self) -> list[tuple[Ticket, list[int]]]:
        """What is under way, with the ranks that each waits for."""
        first = [(ticket, self.box.late()) for ticket in tuple(self._tickets)[:1]]
        return first + [(ticket, self.pairs.missing(ticket)) for ticket in tuple(self._messages)]

    def _missing(self) -> list[int]:
        return sorted({rank for _, ranks in self._current() for rank in ranks})

    def _why_gone(self) -> str:
        for ticket, ranks in self._current():
            if gone := self.peers.gone(ranks):
                return f"rank {self._me}: {ticket.what} over {self.label} cannot end: {gone}"
        return ""

    def _why_late(self) -> str:
        now = time.monotonic()
        for ticket, ranks in self._current():
            if now > ticket.deadline or ticket.operation is not None:
                late = ", ".join(str(self.peers.names[rank]) for rank in ranks)
                why = f"rank {late} did not come" if late else "it was not finished"
                return f"rank {self._me}: {ticket.what} over {self.label} took more than {ticket.timeout:g} s: {why}"
        return ""


class Idle:
    """What to do where there is nothing to do: let others run, then sleep, longer each time."""

    def __init__(self, yields: int = _YIELDS[0]) -> None:
        self._yields, self._most = 0, yields
        self._nap = _NAP_S[0]

    @property
    def fresh(self) -> bool:
        return self._yields == 0

    def enough(self) -> bool:
        """Whether it is time to sleep."""
        if self._yields >= self._most:
            return True
        self._yields += 1
        os.sched_yield()
        return False

    def nap(self) -> float:
        now, self._nap = self._nap, min(2 * self._nap, _NAP_S[1])
        return now
