"""A forked child has its parent's groups, and its parent's place in them, which it must not take."""

from __future__ import annotations

import os
import weakref

from shardgrad.comm.shm.queue import Queue

_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


def guard(queue: Queue) -> None:
    """Have what this process's children begin in a group refused, DataLoader's workers among them."""
    _queues.add(queue)


def _refuse_all() -> None:
    for queue in tuple(_queues):
        queue.refuse_after_fork()


os.register_at_fork(after_in_child=_refuse_all)
