"""The ranks of one pytest run: started once, lent to one test after another, replaced when one is lost."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from .messages import READY, Call, Group, Reply, Task
from .process import RankProcess

START_TIMEOUT = 180.0
"""Seconds for a process to import torch; machines that run tests are often busy."""

GRACE = 3.0
"""Seconds that the other ranks have after one failed or died: they are likely waiting for it."""

TESTS_PER_GROUP = 16
"""A process group is renewed after so many tests, because each device mesh a test makes adds groups to it."""

_POLL = 0.25
_STACKS_TIMEOUT = 3.0
_CLOSE_TIMEOUT = 5.0


class Pool:
    """Runs a call on ranks 0 .. world_size - 1. Smaller worlds use the first of the same processes.

    ``expected`` is the largest world size to come, if known: all processes then start together, at the first
    call. Close it, or leave its ``with`` block; ranks also end by themselves when their parent does.
    """

    def __init__(self, expected: int = 0) -> None:
        self._expected = expected
        self._directory = Path(tempfile.mkdtemp(prefix="shardgrad-ranks-"))
        self._processes: list[RankProcess] = []
        self._ready = 0
        self._group: Group | None = None
        self._generation = 0
        self._uses = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, call: Call, world_size: int, *, backend: str, timeout: float) -> list[Reply]:
        """Returns every rank's reply, after at most ``timeout`` seconds and a few to gather the stacks.

        Starting processes does not count. A pool that lost a rank, or was interrupted, starts afresh.
        """
        try:
            self._start(world_size)
            task = Task(call, self._choose_group(backend, world_size))
            ranks = self._processes[:world_size]
            for rank in ranks:
                rank.send(task)
            replies = _collect(ranks, timeout)
        except BaseException:
            self._kill()
            raise
        if any(reply.status in ("died", "stuck") for reply in replies):
            self._kill()
        elif any(reply.status != "passed" or not reply.group_intact for reply in replies):
            self._group = None  # a collective may be half done, or the test ended the group itself
        return replies

    def close(self) -> None:
        """Lets the ranks end by themselves, which is quick unless a test left something running."""
        ready = self._processes[: self._ready]
        for process in ready:
            process.send(None)
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for process in ready:
            process.exit_code(patience=max(0.0, deadline - time.monotonic()))
        self._kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self._processes.clear()
        self._ready = 0
        self._group = None

    def _start(self, world_size: int) -> None:
        for rank in range(len(self._processes), max(world_size, self._expected)):
            self._processes.append(RankProcess(rank, self._directory))
        deadline = time.monotonic() + START_TIMEOUT
        for rank in range(self._ready, world_size):
            process = self._processes[rank]
            if not process.connection.poll(max(0.0, deadline - time.monotonic())):
                raise RuntimeError(f"rank {rank} did not start within {START_TIMEOUT:g} s")
            try:
                greeting = process.connection.recv()
            except (EOFError, OSError):
                output = "".join(process.take_output())
                raise RuntimeError(f"rank {rank} did not start: {process.how_it_died()}\n{output}") from None
            assert greeting == READY
            self._ready = rank + 1

    def _choose_group(self, backend: str, world_size: int) -> Group:
        group = self._group
        fits = group is not None and (group.backend, group.world_size) == (backend, world_size)
        if group is None or not fits or self._uses == TESTS_PER_GROUP:
            self._generation += 1
            store = self._directory / f"group{self._generation}"
            self._group = group = Group(self._generation, backend, world_size, str(store))
            self._uses = 0
        self._uses += 1
        return group


def _collect(ranks: list[RankProcess], timeout: float) -> list[Reply]:
    """Waits for every rank, or for as long as waiting makes sense."""
    replies: dict[int, Reply] = {}
    deadline = end = time.monotonic() + timeout
    while len(replies) < len(ranks) and (left := deadline - time.monotonic()) > 0:
        running = {rank: process for rank, process in enumerate(ranks) if rank not in replies}
        # The pipe's end shows that a rank died, except where something it started holds it open: look, too.
        wait([process.connection for process in running.values()], min(left, _POLL))
        arrived = {rank: reply for rank, process in running.items() if (reply := _receive(process))}
        replies |= arrived
        if arrived and any(reply.status != "passed" for reply in replies.values()):
            deadline = min(end, time.monotonic() + GRACE)
    stuck = [rank for rank in range(len(ranks)) if rank not in replies]
    for rank, stacks in zip(stuck, _stacks([ranks[rank] for rank in stuck])):
        replies[rank] = Reply("stuck", traceback=stacks)
    outputs = [process.take_output() for process in ranks]
    return [
        dataclasses.replace(replies[rank], stdout=stdout, stderr=stderr)
        for rank, (stdout, stderr) in enumerate(outputs)
    ]


def _receive(process: RankProcess) -> Reply | None:
    """The reply or the death of a rank, None while it runs."""
    ended = process.exit_code() is not None  # read first: a rank may reply, then end
    try:
        if process.connection.poll():
            reply: Reply = process.connection.recv()
            return reply
    except (EOFError, OSError):
        ended = True
    return Reply("died", process.how_it_died(), traceback=process.stacks()) if ended else None


def _stacks(stuck: list[RankProcess]) -> list[str]:
    """Asks all at once, then waits until each has written and stopped writing."""
    for process in stuck:
        process.request_stacks()
    texts: list[str] = []
    deadline = time.monotonic() + _STACKS_TIMEOUT
    while stuck and time.monotonic() < deadline:
        time.sleep(0.1)
        before, texts = texts, [process.stacks() for process in stuck]
        if texts == before and all(texts):
            break
    return texts
