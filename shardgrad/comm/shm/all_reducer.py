"""All-reduces by one operation. What depends on a tensor's shape alone is resolved when the shape is first seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm.shm.collectives import ONCE, AllReduce, AllReduceAtOnce, Meeting
from shardgrad.comm.shm.errors import ShmError
from shardgrad.comm.shm.progress import progress
from shardgrad.comm.shm.queue import Queue, Ticket
from shardgrad.comm.shm.reduce import Reduction, reduction
from shardgrad.comm.shm.tensors import flat_output, words

_MANY_SHAPES = 1024


@dataclass(frozen=True, slots=True)
class _Shape:
    """text: of an all-reduce of such tensors. places: if it takes one round, the slots of all ranks as such tensors, of
    even and of odd rounds."""

    text: str
    by: Reduction
    places: tuple[list[Tensor], list[Tensor]] | None


class AllReducer:
    """In one group, by one operation, in place.

    Raises:
        ShmError: the operation has no meaning for a tensor's dtype (when such a tensor comes).
    """

    def __init__(self, queue: Queue | None, op: Any, label: str) -> None:
        self._open_queue, self._op, self._label = queue, op, label
        self._shapes: dict[tuple[torch.dtype, torch.Size], _Shape] = {}
        self._reductions: dict[torch.dtype, Reduction] = {}

    @property
    def _queue(self) -> Queue:
        if self._open_queue is None:
            raise ShmError(f"{self._label} was destroyed (destroy_process_group)")
        return self._open_queue

    def close(self) -> None:
        """Let go of the group's memory."""
        self._open_queue = None
        self._shapes.clear()

    def start(self, tensors: Sequence[Tensor], opts: Any, timeout: float | None = None) -> Ticket | None:
        """Begin; None if it has ended already.

        Args:
            tensors: one, in a list as torch has it.
            opts: torch's options, of which only `asyncOp` counts.
            timeout: seconds that it may take; None for the group's own.

        Raises:
            ShmError: it is not a dense CPU tensor; the group is broken.
        """
        x, awaited, queue = tensors[0], not opts.asyncOp, self._queue
        shape = self._shapes.get((x.dtype, x.shape)) or self._shape(x)
        seconds = queue.timeout if timeout is None else timeout
        dense = x.is_cpu and x.layout is torch.strided and x.is_contiguous()
        if shape.places is not None and dense:
            operation = AllReduceAtOnce(shape.text, x.data, shape.by, shape.places)
            ticket = queue.begin(operation, x, seconds, awaited=awaited)
        else:
            ticket = self._start(x, shape, seconds, awaited)
        if ticket is not None and not awaited and not ticket.given:
            progress.watch(queue)
        return ticket

    def _start(self, x: Tensor, shape: _Shape, timeout: float, awaited: bool) -> Ticket:
        outputs: list[tuple[Tensor, Tensor]] = []
        flat = flat_output(x, outputs, filled=True)
        operation: Meeting
        if self._queue.box.ranks == 1 or x.numel() == 0:
            operation = Meeting(shape.text)
        elif shape.places is not None:
            places = [[place.view(-1) for place in row] for row in shape.places]
            operation = AllReduceAtOnce(shape.text, flat, shape.by, places)
        else:
            operation = AllReduce(shape.text, flat, shape.by, self._queue.box.ranks)
        ticket = Ticket(self._queue, shape.text, timeout, [x], outputs, operation)
        self._queue.start(ticket, awaited=awaited)
        return ticket

    def by(self, dtype: torch.dtype) -> Reduction:
        """The operation for a dtype."""
        found = self._reductions.get(dtype)
        if found is None:
            found = self._reductions[dtype] = reduction(self._op, dtype, self._queue.box.ranks)
        return found

    def _shape(self, x: Tensor) -> _Shape:
        flat_output(x, [])  # refuses what cannot be moved
        by = self.by(x.dtype)
        ranks, bytes_of_one = self._queue.box.ranks, x.numel() * x.element_size()
        places = None
        if 0 < bytes_of_one * (ranks - 1) <= ONCE:
            places = self._queue.box.places(x.dtype, x.shape)
        if len(self._shapes) >= _MANY_SHAPES:
            self._shapes.clear()
        made = _Shape(words("all-reduce", by.name, x.numel(), x.dtype), by, places)
        self._shapes[x.dtype, x.shape] = made
        return made
