"""After a collective failed: which ranks are still there, and what each was doing.

The group itself is broken by then, so the survivors meet in the key-value store of the default process group.
"""

from __future__ import annotations

import time
import weakref

import torch.distributed as dist

from shardgrad.comm import shim
from shardgrad.comm.mesh import Axis

PATIENCE = 5.0  # seconds that the survivors give each other to report
_failures: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


def failure_report(what: str, axis: Axis) -> str:
    """One line for each other rank of the axis: in which operation it failed, or that it does not answer."""
    count = _failures[axis.group] = _failures.get(axis.group, 0) + 1

    def key(rank: int) -> str:
        return f"shardgrad/failed/{axis.group.group_name}/{count}/{rank}"

    me = dist.get_rank()
    others = [rank for rank in axis.ranks if rank != me]
    said: dict[int, str] = {}
    try:
        store = shim.store()
        store.set(key(me), what)
        deadline = time.monotonic() + PATIENCE
        while len(said) < len(others):
            for rank in others:
                if rank not in said and store.check([key(rank)]):
                    said[rank] = store.get(key(rank)).decode()
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    except (RuntimeError, ValueError) as error:
        return f"The other ranks cannot be asked, for the store is gone too ({str(error).strip().splitlines()[0]}).\n"
    lines = [
        f"  rank {rank} failed in: {said[rank]}"
        if rank in said
        else f"  rank {rank} does not answer (within {PATIENCE:.0f} s): it died, or is busy elsewhere"
        for rank in others
    ]
    return "\n".join(("The other ranks of the axis:", *lines, ""))
