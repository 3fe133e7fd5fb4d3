"""How far this rank has come in a process group, and the processes of the group's other ranks."""

from __future__ import annotations

import contextlib
import json
import time
import weakref

import torch.distributed as dist

from shardgrad.comm import shim
from shardgrad.comm.ask import SILENT_S, Question, StoreError, ask
from shardgrad.comm.processes import Process, Processes, this_process

BRIEFLY_S = 2.0
"""How long a rank that waits for others lets the store think, before it looks at them again."""


class Standing:
    """Of one process group.

    begun, compared: how many of shardgrad's collectives, and of its comparisons (see `comparison`), this rank has
        begun in the group. Ranks of one program count alike.
    """

    __slots__ = ("_processes", "_silent", "begun", "compared", "index", "name", "rank", "ranks", "timeout")

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        self.rank, self.index = dist.get_rank(), dist.get_rank(group)
        self.name, self.timeout = group.group_name, shim.timeout_of(group)
        self.begun = self.compared = 0
        self._processes: Processes | None = None
        self._silent: float | None = None
        mine = json.dumps(this_process().as_json())
        if len(self.ranks) > 1:
            Question(lambda _: shim.store().set(_card(self.rank), mine))  # nobody waits for it

    @property
    def others(self) -> list[int]:
        return [rank for rank in self.ranks if rank != self.rank]

    def trouble(self) -> str:
        """Which of the other ranks will not come, in words; empty if all may."""
        self.learn()
        return self._processes.trouble(self.others) if self._processes is not None else ""

    def learn(self) -> None:
        """Find out about the others' processes, while the store can be asked; once known, it is not asked again."""
        if self._processes is None:
            with contextlib.suppress(StoreError):  # which says more when what is wanted of it is more than this
                self._processes = ask(self._read, BRIEFLY_S)

    def heard(self, answered: bool) -> bool:
        """Note whether the store has answered a question; False if it has not for `SILENT_S`."""
        now = time.monotonic()
        self._silent = None if answered else now if self._silent is None else self._silent
        return self._silent is None or now - self._silent < SILENT_S

    def _read(self) -> Processes | None:
        store, keys = shim.store(), [_card(rank) for rank in self.ranks]
        if not store.check(keys):
            return None
        return Processes({rank: Process.from_json(json.loads(store.get(key))) for rank, key in zip(self.ranks, keys)})


_standings: weakref.WeakKeyDictionary[dist.ProcessGroup, Standing] = weakref.WeakKeyDictionary()


def standing_in(group: dist.ProcessGroup) -> Standing:
    """One for each group, whatever meshes it is an axis of."""
    found = _standings.get(group)
    if found is None:
        found = _standings[group] = Standing(group)
    return found


def _card(rank: int) -> str:
    return f"shardgrad/process/{rank}"
