"""Start the process group of a job that may have been started before, in which old ranks have left their marks.

torchrun keeps one store over all restarts of a job, and torch's ranks look each other up in it by keys that do not
change: a rank that is quicker than its peer finds the address of the peer that died, and waits in vain. So ranks
first make sure of each other: every rank brings an identity of its own, the first one collects them until each has
answered to it, and what follows happens under keys that are unused.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from shardgrad.errors import CollectiveError

_POLL_S = 0.02


def start_process_group(backend: str, timeout: timedelta) -> None:
    """`init_process_group` of the ranks that torchrun (or its environment variables) started; alone without it.

    Raises:
        CollectiveError: a rank has not come within `timeout`; names it.
    """
    if "RANK" not in os.environ:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return
    shared, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    store = rendezvous(shared, rank, ranks, timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=ranks)


def rendezvous(shared: Store, rank: int, ranks: int, timeout: timedelta) -> Store:
    """A part of a store that only the ranks which are here now use. Called by all of them."""
    store = PrefixStore("shardgrad meeting", shared)
    mine = uuid.uuid4().hex
    until = time.monotonic() + timeout.total_seconds()
    store.set(f"here {rank}", mine)
    while True:
        seen = [_read(store, f"here {other}") for other in range(ranks)] if rank == 0 else []
        if rank == 0:
            store.set("seen", json.dumps(seen))
        else:
            seen = json.loads(_read(store, "seen") or "[]")
        # Only the present leader can have seen an identity that is new.
        if len(seen) == ranks and seen[rank] == mine:
            leader = seen[0]
            store.set(f"{leader} answered by {mine}", "")
            if rank == 0 and all(one and store.check([f"{leader} answered by {one}"]) for one in seen):
                store.set(f"{leader} begins", "")
            if store.check([f"{leader} begins"]):
                return PrefixStore(str(leader), store)
        if time.monotonic() > until:
            raise CollectiveError(_absent(seen, rank, timeout))
        time.sleep(_POLL_S)


def _read(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _absent(seen: list[str | None], rank: int, timeout: timedelta) -> str:
    waited = f"rank {rank} has waited for {timeout.total_seconds():g} s for the ranks of the job to come together"
    if rank:
        return f"{waited}: rank 0 did not answer"
    never = [str(other) for other, one in enumerate(seen) if one is None]
    which = f"ranks {', '.join(never)} never came" if never else "a rank has come and gone"
    return f"{waited}: {which}"
