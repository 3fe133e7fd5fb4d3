"""The collectives of one group, done in their order by a thread: first the ranks compare what they call."""

from __future__ import annotations

import hashlib
import itertools
import json
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shardgrad.errors import shorten

from .pending import Awaited
from .stuck import Waiting
from .transfer import Transfer, Wire

_SIGNATURE = 4096


class MismatchError(RuntimeError):
    """The ranks of a group do not call the same collective: on NCCL they would hang, or take each other's data."""


class Collective(Awaited):
    """A collective that a lane does, of one transfer or of several that were coalesced."""

    def __init__(self, what: str, transfers: Sequence[Transfer], waiting: Callable[[str], Waiting]) -> None:
        super().__init__(
            what,
            [out for one in transfers for out in one.outs],
            [kept for one in transfers for kept in one.kept],
            waiting,
        )
        self.transfers = list(transfers)


class Lane:
    """One group's thread. names: the ranks as the program numbers them."""

    def __init__(self, wire: Wire, names: Sequence[int], label: str) -> None:
        self._wire, self._names, self._label = wire, list(names), label
        self._queue: queue.SimpleQueue[Collective | None] = queue.SimpleQueue()
        self._broken: Exception | None = None
        threading.Thread(target=self._serve, name=f"late {label}", daemon=True).start()

    def start(self, collective: Collective) -> None:
        self._queue.put(collective)

    def close(self) -> None:
        self._queue.put(None)

    def _serve(self) -> None:
        while (collective := self._queue.get()) is not None:
            try:
                if self._broken is not None:
                    raise self._broken
                if self._wire.size > 1:
                    self._compare(collective)
                collective.brought = np.concatenate(
                    [*(one.run(self._wire) for one in collective.transfers), np.empty(0, np.uint8)]
                )
            except MismatchError as error:  # all ranks have found it alike, before any data went: they may go on
                collective.error = error
            except Exception as error:
                text = f"{collective.what} failed: {error}\n  started at {collective.started}"
                self._broken = collective.error = RuntimeError(text)
            collective.transfers = []
            collective.done.set()
            del collective

    def _compare(self, collective: Collective) -> None:
        calls = [one.call for one in collective.transfers]
        moves = [[one.sends, one.takes] for one in collective.transfers]
        mine: dict[str, Any] = {"calls": calls, "moves": moves, "at": shorten(str(collective.started), 600)}
        text = json.dumps(mine)
        if len(text.encode()) > _SIGNATURE:  # many tensors: how many, and a sum of what is called of them
            mine["calls"], mine["moves"] = [shorten("; ".join(calls), 300), _digest("; ".join(calls))], []
            text = json.dumps(mine)
        raw = np.frombuffer(text.encode().ljust(_SIGNATURE), np.uint8)
        size = self._wire.size
        all_of_them = self._wire.exchange([raw] * size, [_SIGNATURE] * size).tobytes()
        said = [json.loads(all_of_them[at : at + _SIGNATURE]) for at in range(0, len(all_of_them), _SIGNATURE)]
        if any(one["calls"] != said[0]["calls"] for one in said):
            lines = [
                f"  rank {name}: {'; '.join(one['calls'])}, at {one['at']}" for name, one in zip(self._names, said)
            ]
            raise MismatchError("\n".join([f"the ranks of {self._label} call different collectives:", *lines]))
        if all(one["moves"] for one in said):
            self._compare_bytes(said)

    def _compare_bytes(self, said: Sequence[dict[str, Any]]) -> None:
        """Compare what each rank sends to each with what that one takes; all ranks come to the same verdict."""
        for part, call in enumerate(said[0]["calls"]):
            sends = [one["moves"][part][0] for one in said]
            takes = [one["moves"][part][1] for one in said]
            for i, j in itertools.product(range(len(said)), repeat=2) if sends[0] else ():
                if sends[i][j] != takes[j][i]:
                    source, target = self._names[i], self._names[j]
                    raise MismatchError(
                        f"{call} over {self._label}: rank {source} sends {sends[i][j]} bytes to rank {target}, which "
                        f"takes {takes[j][i]}\n  rank {source} at {said[i]['at']}\n  rank {target} at {said[j]['at']}"
                    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
