"""A rank that waits for long asks, through the store, whether the ranks that it waits for can still come."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from shardgrad.comm import shim

LOOK_S = 4.0
"""Seconds of waiting before a rank looks, and between its looks."""


Count = tuple[str | int, ...]
"""What is counted: the collectives of a group, or the messages of a group from one rank to another."""


class DeadlockError(RuntimeError):
    """Ranks wait for each other in a circle, or for one that has ended its block."""


class Waiting:
    """One wait.

    of, number: what is awaited, in its order. ranks: those that have a part in it. counts: of what this rank has
        started.
    """

    def __init__(self, of: Count, ranks: tuple[int, ...], number: int, text: str, counts: Mapping[Count, int]) -> None:
        self._of, self._ranks, self._number, self._text, self._counts = of, ranks, number, text, counts
        self._mine: dict[str, Any] = {}
        self._seen = ""

    def until(self, done: threading.Event) -> None:
        """Wait, and look from time to time.

        Raises:
            DeadlockError: it will not be done.
        """
        if done.wait(LOOK_S):
            return
        self.look()
        while not done.wait(LOOK_S):
            self.look()
        self.end()

    def look(self) -> None:
        """Say what this rank waits for, and read what the others do.

        Raises:
            DeadlockError: two looks have found the same circle.
        """
        if not dist.is_initialized():
            return
        store = shim.store()
        if not self._mine:
            waits = {"of": _name(self._of), "ranks": self._ranks, "number": self._number, "text": self._text}
            self._mine = {**waits, "counts": _named(self._counts)}
            store.set(_key(dist.get_rank()), json.dumps(self._mine))
        said = {dist.get_rank(): self._mine}
        for rank in range(dist.get_world_size()):
            if rank not in said and store.check([_key(rank)]):
                said[rank] = json.loads(store.get(_key(rank)))
        found = circle(said, dist.get_rank())
        if found and found == self._seen:
            raise DeadlockError(found)  # what it said stays, for the others to find the same
        self._seen = found

    def end(self) -> None:
        """The wait is over."""
        if self._mine:
            shim.store().delete_key(_key(dist.get_rank()))


def ended(rank: int, counts: Mapping[Count, int]) -> None:
    """Say that a rank has ended its block, and calls nothing any more until the others have too."""
    shim.store().set(_key(rank), json.dumps({"ended": True, "counts": _named(counts)}))


def goes_on(rank: int) -> None:
    shim.store().delete_key(_key(rank))


def circle(said: Mapping[int, Any], start: int) -> str:
    """What a rank waits for in vain, in words; empty if every rank that it waits for may still come.

    said: of each rank that waits, what it waits for, or that it has ended its block.
    """
    lines: list[str] = []
    path = [start]
    while True:
        rank, one = path[-1], said[path[-1]]
        lines.append(f"  rank {rank} waits in {one['text']}")
        absent = [o for o in one["ranks"] if o != rank and o in said and _has_not_come(said[o], one)]
        if not absent:
            return ""
        back = next((o for o in absent if o in path or "ended" in said[o]), None)
        if back is not None:
            last = "has ended the block" if "ended" in said[back] else "is above"
            return "\n".join(["ranks wait for each other:", *lines, f"  for rank {back}, which {last}"])
        path.append(absent[0])


def _has_not_come(other: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    return bool(other["counts"].get(one["of"], 0) <= one["number"])


def _name(count: Count) -> str:
    return " ".join(map(str, count))


def _named(counts: Mapping[Count, int]) -> dict[str, int]:
    return {_name(of): count for of, count in counts.items()}


def _key(rank: int) -> str:
    return f"shardgrad/late/waits/{rank}"
