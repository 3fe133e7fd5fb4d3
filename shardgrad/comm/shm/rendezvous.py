"""How the ranks of a group come to map the same memory: through the store that torch hands to a backend."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from shardgrad.comm.processes import Process, Processes, this_process
from shardgrad.comm.shm.errors import ShmError
from shardgrad.comm.shm.peers import Peers
from shardgrad.comm.shm.segment import ATTACHED, Plan, Segment, create, no_descriptors

_STEP_S = 0.002


def rendezvous(store: Any, rank: int, size: int, timeout: float, names: list[int]) -> tuple[Segment, Peers]:
    """Map the group's memory, with every rank's. names: the ranks as the program numbers them.

    Raises:
        ShmError: a rank did not come in time, died, or is where this memory cannot be reached.
    """
    deadline = time.monotonic() + timeout
    # A store may outlive a group and see the next one of the same name: everyone's n-th time is one meeting.
    time_of_joining = store.add(f"joins/{rank}", 1)

    def key(what: object) -> str:
        return f"{time_of_joining}/{what}"

    plan = Plan(size)
    me: dict[str, Any] = {"process": this_process().as_json()}
    descriptor = -1
    if rank == 0:
        descriptor = create(plan)
        status = os.fstat(descriptor)
        me |= {"fd": descriptor, "file": [status.st_dev, status.st_ino]}
    try:
        store.set(key(rank), json.dumps(me))
        keys = [key(other) for other in range(size)]
        try:
            store.wait(keys, timedelta(seconds=max(timeout, 0.001)))
        except (RuntimeError, ValueError) as error:
            missing = [names[r] for r in range(size) if not store.check([keys[r]])]
            if not missing:
                raise
            raise ShmError(
                f"rank {names[rank]}: {_ranks(missing)} did not come to the shm group within {timeout:g} s"
            ) from error
        cards = [json.loads(store.get(one)) for one in keys]
        processes = {name: Process.from_json(card["process"]) for name, card in zip(names, cards)}
        elsewhere = [name for name, one in processes.items() if one.place != processes[names[rank]].place]
        if elsewhere:
            raise ShmError(
                f"rank {names[rank]}: {_ranks(elsewhere)} run on another host or in another container (another boot or "
                "another process namespace): shared memory reaches the ranks of one host only, use the gloo backend"
            )
        if rank:
            descriptor = _open(cards[0], names[0])
        segment = Segment(descriptor, plan)
        peers = Peers(segment, rank, Processes(processes), names)
        segment.words[plan.word(rank, ATTACHED)] = 1
        # The first rank keeps the file open, and so reachable, until everyone maps it.
        attached = [plan.word(r, ATTACHED) for r in range(size)]
        _wait(lambda: [r for r in range(size) if not segment.words[attached[r]]], peers, deadline, timeout)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return segment, peers


def _wait(missing: Callable[[], list[int]], peers: Peers, deadline: float, timeout: float) -> None:
    while late := missing():
        gone = peers.gone(late)
        if gone and missing():
            raise ShmError(f"rank {peers.names[peers.rank]}: {gone}, while the ranks were meeting")
        if time.monotonic() > deadline:
            raise ShmError(
                f"rank {peers.names[peers.rank]}: {_ranks([peers.names[r] for r in late])} did not map the memory of "
                f"the shm group within {timeout:g} s"
            )
        time.sleep(_STEP_S)


def _open(card: dict[str, Any], owner: int) -> int:
    path = f"/proc/{card['process']['pid']}/fd/{card['fd']}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ShmError(f"the memory of rank {owner} cannot be opened: {no_descriptors()}") from None
        raise ShmError(
            f"the memory of rank {owner} cannot be opened at {path} ({error.strerror}): all ranks must be processes of "
            "one user that may look at each other; otherwise use the gloo backend"
        ) from None
    status = os.fstat(descriptor)
    if [status.st_dev, status.st_ino] != card["file"]:
        os.close(descriptor)
        raise ShmError(f"{path} is not the memory that rank {owner} announced: that process is another one by now")
    return descriptor


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
