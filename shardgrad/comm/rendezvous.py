"""Start the process group of a job that may have been started before, in which old ranks have left their marks.

torchrun keeps one store over all restarts of a job, and torch's ranks look each other up in it by keys that do not
change: a rank that is quicker than its peer finds the address of the peer that died, and waits in vain. So ranks
first make sure of each other: every rank brings an identity of its own, the first one collects them until each has
answered to it, and what follows happens under keys that are unused.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from shardgrad.comm.ask import SILENT_S, Question, StoreError, keeper, silent_store
from shardgrad.comm.processes import Process, this_process
from shardgrad.comm.watch import Watch
from shardgrad.errors import CollectiveError

START_S = 20.0
"""How long ranks that have come to the start of a job wait for the next one."""

_POLL_S = 0.02
_LINGER_S = 1.5  # how long the one that keeps the store stays, when it gives up, for the others to do the same
_REFUSED_S = 5.0  # how long a rank that does not take part tries to say so
_PREFIX, _REFUSED = "shardgrad meeting", "refused"


@dataclass(frozen=True)
class Meeting:
    """The ranks of a job that have come together. store: a part of one that they alone use. processes: by rank."""

    store: Store
    processes: dict[int, Process]


def start_process_group(backend: str, timeout: timedelta, start: float = START_S) -> Watch:
    """`init_process_group` of the ranks that torchrun (or its environment variables) started; alone without it.

    timeout: of collectives. start: seconds after which a rank that has not come, since the last that has, is missed.

    Returns:
        What ends this rank from now on if another can never go on; to be told when it ends.

    Raises:
        CollectiveError: a rank has not come, or will not take part; names it.
    """
    if "RANK" not in os.environ:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=alone, rank=0, world_size=1)
        return Watch(alone, 0, {0: this_process()})
    shared, rank, ranks = _open_store(start)
    question = Question(lambda question: rendezvous(shared, rank, ranks, timedelta(seconds=start), question))
    while not question.wait(1.0):
        if time.monotonic() - question.heard > SILENT_S:
            raise StoreError(f"rank {rank}, at the start of the job: {silent_store(SILENT_S)}")
    meeting = question.answer
    shared.set_timeout(timeout)
    watch = Watch(PrefixStore("watch", meeting.store), rank, meeting.processes)
    dist.init_process_group(backend, timeout=timeout, store=meeting.store, rank=rank, world_size=ranks)
    return watch


def refuse(why: str) -> None:
    """Tell the other ranks of the job, which may be waiting for this one, that it does not take part. Returns soon,
    whether they have heard it or not."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return

    def put(_: object) -> None:
        store = PrefixStore(_PREFIX, _open_store(_REFUSED_S)[0])
        store.compare_set(_REFUSED, "", json.dumps({"rank": rank, "why": why}))
        until = time.monotonic() + (_REFUSED_S if rank == 0 and keeper().startswith("rank 0") else 0.0)
        heard = [f"heard {other}" for other in range(ranks) if other != rank]
        while time.monotonic() < until and not store.check(heard):
            time.sleep(_POLL_S)

    Question(put).wait(2 * _REFUSED_S)


def rendezvous(
    shared: Store, rank: int, ranks: int, timeout: timedelta, question: Question[Any] | None = None
) -> Meeting:
    """The ranks that are here now. Called by all of them; whoever waits for more than `timeout` for one more gives up.

    Raises:
        CollectiveError: a rank has not come, does not answer, or has said that it will not take part.
    """
    store = PrefixStore(_PREFIX, shared)
    mine = json.dumps({"id": uuid.uuid4().hex, **this_process().as_json()})
    last, known = time.monotonic(), 0
    store.set(f"here {rank}", mine)
    while True:
        seen = [_read(store, f"here {other}") for other in range(ranks)] if rank == 0 else []
        if rank == 0:
            store.set("seen", json.dumps(seen))
        else:
            seen = json.loads(_read(store, "seen") or "[]")
        # Only the present leader can have seen an identity that is new.
        if len(seen) == ranks and seen[rank] == mine:
            leader = json.loads(seen[0] or "{}").get("id")
            store.set(f"{leader} answered by {mine}", "")
            if rank == 0 and all(one and store.check([f"{leader} answered by {one}"]) for one in seen):
                store.set(f"{leader} begins", "")
            if store.check([f"{leader} begins"]):
                processes = {other: Process.from_json(json.loads(one or "")) for other, one in enumerate(seen)}
                return Meeting(PrefixStore(str(leader), store), processes)
        if text := _read(store, _REFUSED):
            store.set(f"heard {rank}", "")
            raise CollectiveError("rank {rank} does not take part: {why}".format(**json.loads(text)))
        now = time.monotonic()
        if len(set(seen) - {None}) > known:
            last, known = now, len(set(seen) - {None})
        if question is not None:
            question.heard = now
        if now - last > timeout.total_seconds():
            missing = _missing(store, seen, rank, mine)
            if rank == 0:
                time.sleep(min(_LINGER_S, timeout.total_seconds()))
            raise CollectiveError(
                f"rank {rank} has waited for {timeout.total_seconds():g} s, since the last rank came, for the ranks of "
                f"the job to come together: {missing}"
            )
        time.sleep(_POLL_S)


def _open_store(seconds: float) -> tuple[Store, int, int]:
    """The store that the environment names, opened by rank 0 if nobody else keeps it; this rank, and how many there
    are.

    Raises:
        CollectiveError: it cannot be reached within so many seconds.
    """
    rank, ranks, limit = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=seconds)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = keeper().startswith("torchrun")
    first = rank == 0 and not kept

    def connect(_: object) -> Store:
        # As torch's "env://" does, but that this does not wait there for all ranks, and so can say which are missing;
        # torch's own attempts to connect last longer than they are told to.
        while not (first or _listens(address, port)):
            if time.monotonic() > until:
                raise StoreError("nobody listens there")
            time.sleep(5 * _POLL_S)
        return dist.TCPStore(address, port, ranks, first, limit, wait_for_workers=False, multi_tenant=True)  # type: ignore[attr-defined]

    until = time.monotonic() + seconds
    question = Question(connect)
    try:
        if not question.wait(seconds + 1):
            raise StoreError("it does not answer")
        store = question.answer
    except StoreError as error:
        raise CollectiveError(
            f"rank {rank} cannot reach the store of the job, which {keeper()} keeps, within {seconds:g} s: its keeper "
            f"was not started, died, or is stopped ({error})"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return (PrefixStore(f"/worker/attempt_{attempt}", store) if kept else store), rank, ranks


def _listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def _read(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _missing(store: Store, seen: list[str | None], rank: int, mine: str) -> str:
    """Who has not come, in words."""
    if rank and (len(seen) <= rank or seen[rank] != mine):
        return "rank 0 did not answer"
    never = [str(other) for other, one in enumerate(seen) if one is None]
    if never:
        return f"{'rank' if len(never) == 1 else 'ranks'} {', '.join(never)} never came"
    leader = json.loads(seen[0] or "")["id"]
    silent = [(other, one) for other, one in enumerate(seen) if not store.check([f"{leader} answered by {one}"])]
    pids = {other: json.loads(one or "")["pid"] for other, one in silent}
    return "; ".join(f"rank {other} (process {pid}) came, and does not answer" for other, pid in pids.items())
