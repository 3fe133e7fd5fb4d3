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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from shardgrad.comm.ask import SILENT_S, Question, StoreError, first_line, keeper, kept_by_torchrun, read, silent_store
from shardgrad.comm.backend import let_nccl_go_first
from shardgrad.comm.processes import Process, Processes, this_process
from shardgrad.comm.watch import Watch
from shardgrad.errors import CollectiveError

START_S = 20.0
"""How long ranks that have come to the start of a job wait for the next one."""

_POLL_S, _LOOK_S = 0.02, 0.5
_LINGER_S = 1.5  # how long the one that keeps the store stays, when it gives up, for the others to do the same
_REFUSED_S = 5.0  # how long a rank that does not take part tries to say so
_PREFIX, _REFUSED = "shardgrad meeting", "refused"


@dataclass(frozen=True)
class Meeting:
    """The ranks of a job that have come together. store: a part of one that they alone use. processes: by rank."""

    store: Store
    processes: dict[int, Process]


class Arrival:
    """A rank's coming to its job, from when it begins: it says that it comes before it looks at files and
    configurations, which may take long, and is waited for while its process is at work.

    start: seconds that ranks which have come wait for the next one to do so, if they see nothing of it; may be set
        when it is known.
    """

    def __init__(self) -> None:
        self.start = START_S
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._opened = Question(self._come) if "RANK" in os.environ else None

    def _come(self, _: object) -> Store:
        store = _open_store(self.rank, self.ranks, lambda: self.start)
        PrefixStore(_PREFIX, store).set(f"coming {self.rank}", json.dumps(this_process().as_json()))
        return store

    def store(self) -> Store | None:
        """The job's; None without torchrun's environment, for a rank alone.

        Raises:
            CollectiveError: it cannot be reached within `start`.
        """
        if self._opened is None:
            return None
        if not self._opened.wait(2 * self.start):
            raise CollectiveError(_out_of_reach(self.rank, self.start, "it does not answer"))
        return self._opened.answer

    def refuse(self, why: str) -> None:
        """Tell the other ranks, which may be waiting for this one, that it does not take part. Returns soon, whether
        they have heard it or not."""
        if self._opened is None or self.ranks == 1 or not self._opened.wait(_REFUSED_S):
            return
        opened = self._opened

        def put(_: object) -> None:
            store = PrefixStore(_PREFIX, opened.answer)
            store.compare_set(_REFUSED, "", json.dumps({"rank": self.rank, "why": why}))
            until = time.monotonic() + (_REFUSED_S if self.rank == 0 and not kept_by_torchrun() else 0.0)
            heard = [f"heard {other}" for other in range(self.ranks) if other != self.rank]
            while time.monotonic() < until and not store.check(heard):
                time.sleep(_POLL_S)

        Question(put).wait(2 * _REFUSED_S)


def start_process_group(backend: str, timeout: timedelta, arrival: Arrival | None = None) -> Watch:
    """`init_process_group` of the ranks that torchrun (or its environment variables) started; alone without it.

    timeout: of collectives. arrival: since this rank began, if it did something else before.

    Returns:
        What ends this rank from now on if another can never go on; to be told when it ends.

    Raises:
        CollectiveError: a rank has not come, or will not take part; names it.
    """
    if backend == "nccl":
        let_nccl_go_first()
    arrival = arrival or Arrival()
    shared, rank, ranks = arrival.store(), arrival.rank, arrival.ranks
    if shared is None:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=alone, rank=0, world_size=1)
        return Watch(alone, 0, {0: this_process()})
    patience = timedelta(seconds=arrival.start)
    question = Question(lambda question: rendezvous(shared, rank, ranks, patience, timeout, question))
    while not question.wait(1.0):
        if time.monotonic() - question.heard > SILENT_S:
            raise StoreError(f"rank {rank}, at the start of the job: {silent_store(SILENT_S)}")
    meeting = question.answer
    shared.set_timeout(timeout)
    watch = Watch(PrefixStore("watch", meeting.store), rank, meeting.processes)
    dist.init_process_group(backend, timeout=timeout, store=meeting.store, rank=rank, world_size=ranks)
    return watch


def rendezvous(
    shared: Store,
    rank: int,
    ranks: int,
    start: timedelta,
    timeout: timedelta = timedelta(0),
    question: Question[Any] | None = None,
) -> Meeting:
    """The ranks that are here now. Called by all of them.

    start: how long to wait for one more rank, if nothing is seen of it. timeout: how long if it has said that it comes;
    one whose process is at work on this host is waited for as long as it takes.

    Raises:
        CollectiveError: a rank has not come, does not answer, or has said that it will not take part.
    """
    store = PrefixStore(_PREFIX, shared)
    mine = json.dumps({"id": uuid.uuid4().hex, **this_process().as_json()})
    last = looked = time.monotonic()
    known, coming = 0, _Coming()
    store.set(f"here {rank}", mine)
    while True:
        seen = [read(store, f"here {other}") for other in range(ranks)] if rank == 0 else []
        if rank == 0:
            store.set("seen", json.dumps(seen))
        else:
            seen = json.loads(read(store, "seen") or "[]")
        # Only the present leader can have seen an identity that is new.
        if len(seen) == ranks and seen[rank] == mine:
            leader = json.loads(seen[0] or "{}").get("id")
            store.set(f"{leader} answered by {mine}", "")
            if rank == 0 and all(one and store.check([f"{leader} answered by {one}"]) for one in seen):
                store.set(f"{leader} begins", "")
            if store.check([f"{leader} begins"]):
                processes = {other: Process.from_json(json.loads(one or "")) for other, one in enumerate(seen)}
                return Meeting(PrefixStore(str(leader), store), processes)
        if text := read(store, _REFUSED):
            store.set(f"heard {rank}", "")
            raise CollectiveError("rank {rank} does not take part: {why}".format(**json.loads(text)))
        now = time.monotonic()
        if len(set(seen) - {None}) > known:
            last, known = now, len(set(seen) - {None})
        if question is not None:
            question.heard = now
        if now - looked > _LOOK_S:
            looked = now
            late = [now - last > limit.total_seconds() for limit in (start, timeout)]
            if why := coming.trouble(store, _missing(store, seen, rank, mine), *late):
                if rank == 0:
                    time.sleep(min(_LINGER_S, start.total_seconds()))
                waited = f"rank {rank} has waited for {now - last:.3g} s, since the last rank came"
                raise CollectiveError(f"{waited}, for the ranks of the job to come together: {why}")
        time.sleep(_POLL_S)


class _Coming:
    """What is seen of ranks that have said that they come."""

    def __init__(self) -> None:
        self._processes: dict[str, Processes] = {}

    def trouble(self, store: Store, missing: list[int], late: bool, very_late: bool) -> str:
        """Why these ranks are not to be waited for any longer, in words; empty while they are. Asked again and again.

        late: whether those of which nothing is seen, or which died and might be started again, have had their time.
        very_late: whether those of other hosts have.
        """
        never, said = [], []
        for rank in missing:
            text = read(store, f"coming {rank}")
            if text is None:
                never.append(str(rank))
                continue
            if text not in self._processes:
                self._processes[text] = Processes({rank: Process.from_json(json.loads(text))})
            processes = self._processes[text]
            trouble = processes.trouble([rank])
            if trouble and (late or not processes.gone([rank])):
                said.append(trouble)
            elif very_late and not processes.sees(rank):
                said.append(f"rank {rank} has come, and does not answer")
        if late and never:
            said.append(f"{'rank' if len(never) == 1 else 'ranks'} {', '.join(never)} never came")
        return "; ".join(said)


def _open_store(rank: int, ranks: int, limit: Callable[[], float]) -> Store:
    """The store that the environment names, opened by rank 0 if nobody else keeps it.

    limit: seconds that this may take.

    Raises:
        CollectiveError: it cannot be reached so soon.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    first = rank == 0 and not kept_by_torchrun()
    began = time.monotonic()
    # As torch's "env://" does, but that this does not wait there for all ranks, and so can say which are missing; and
    # torch's own attempts to connect last longer than they are told to.
    while not (first or _listens(address, port)):
        if time.monotonic() - began > (seconds := limit()):
            raise CollectiveError(_out_of_reach(rank, seconds, "nobody listens there"))
        time.sleep(5 * _POLL_S)
    seconds = limit()
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, ranks, first, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True
        )
    except (dist.DistError, RuntimeError) as error:
        raise CollectiveError(_out_of_reach(rank, seconds, first_line(error))) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"/worker/attempt_{attempt}", store) if kept_by_torchrun() else store


def _out_of_reach(rank: int, seconds: float, why: str) -> str:
    return (
        f"rank {rank} cannot reach the store of the job, which {keeper()} keeps, within {seconds:g} s: its keeper was "
        f"not started, died, or is stopped ({why})"
    )


def _listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def _missing(store: Store, seen: list[str | None], rank: int, mine: str) -> list[int]:
    """Who has not come, or does not answer."""
    if rank and (len(seen) <= rank or seen[rank] != mine):
        return [0]
    never = [other for other, one in enumerate(seen) if one is None]
    if never:
        return never
    leader = json.loads(seen[0] or "")["id"]
    return [other for other, one in enumerate(seen) if not store.check([f"{leader} answered by {one}"])]
