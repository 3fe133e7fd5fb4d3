"""Send and receive: a ring of records for each ordered pair of ranks.

Messages between two ranks arrive in the order they were sent. One whose tag has not been asked for is set aside in the
receiver's own memory, so that tags may be received in any order.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm.shm.errors import ShmError
from shardgrad.comm.shm.mailbox import Mailbox
from shardgrad.comm.shm.segment import RECORD, RING

_HEAD = struct.Struct("<qqq32s")  # tag, bytes of the message, bytes in this record, dtype
ANY = -1


@dataclass(eq=False, slots=True)
class Sending:
    """A message on its way out. data: flat bytes."""

    ticket: Any
    data: Tensor
    tag: int
    dtype: bytes
    done: int = 0
    started: bool = False


@dataclass(eq=False, slots=True)
class Receiving:
    """A place for a message. source: ANY, until one has come."""

    ticket: Any
    target: Tensor
    source: int
    tag: int
    dtype: bytes


@dataclass(eq=False, slots=True)
class _Message:
    """A message that comes in: into its receiver's target, or into memory of its own until it is received."""

    source: int
    tag: int
    dtype: bytes
    buffer: Tensor
    want: Receiving | None
    got: int = 0


class Pairs:
    """All messages from and to one rank."""

    def __init__(self, box: Mailbox, names: list[int]) -> None:
        self.box, self.names, self.words = box, names, box.words
        self.plan = box.segment.plan
        self.sending: dict[int, deque[Sending]] = {}
        self.waiting: list[Receiving] = []
        self._aside: list[_Message] = []
        self._coming: dict[int, _Message] = {}

    def busy(self) -> bool:
        return bool(self.sending or self.waiting)

    def send(self, target: int, sending: Sending) -> None:
        self.sending.setdefault(target, deque()).append(sending)

    def receive(self, want: Receiving) -> bool:
        """Whether the message was there already, and has been delivered."""
        for message in self._aside:
            if message.want is None and _fits(want, message.source, message.tag):
                message.want, want.source = want, message.source
                self._check(want, message)
                if message.got == message.buffer.numel():
                    self._aside.remove(message)
                    self._deliver(message)
                    return True
                break
        self.waiting.append(want)
        return False

    def move(self) -> list[Any]:
        """Write and read as much as can be; returns the tickets of what is finished."""
        finished: list[Any] = []
        for target in list(self.sending):
            self._write(target, finished)
        sources = {want.source for want in self.waiting}
        if ANY in sources:
            sources = set(range(self.plan.ranks))
        for source in sources:
            self._read(source, finished)
        return finished

    def missing(self, ticket: Any) -> list[int]:
        """The ranks for which a ticket waits."""
        for target, queue in self.sending.items():
            if any(sending.ticket is ticket for sending in queue):
                return [target]
        for want in self.waiting:
            if want.ticket is ticket:
                return self.box.others if want.source == ANY else [want.source]
        return []

    def clear(self) -> None:
        self.sending.clear()
        self.waiting.clear()
        self._aside.clear()
        self._coming.clear()

    def _write(self, target: int, finished: list[Any]) -> None:
        queue, me, wrote = self.sending[target], self.box.rank, False
        head = self.plan.head(me, target)
        count = self.words[head]
        while queue and count - self.words[head + 8] < RING:
            sending = queue[0]
            part = sending.data[sending.done : sending.done + RECORD]
            at, size = self.plan.ring(me, target, count), part.numel()
            _HEAD.pack_into(self.box.segment.raw, at, sending.tag, sending.data.numel(), size, sending.dtype)
            self.box.segment.bytes[at + 64 : at + 64 + size].copy_(part)
            self.box.fence()
            count += 1
            self.words[head] = count
            sending.done += size
            wrote = True
            if sending.done == sending.data.numel():
                queue.popleft()
                finished.append(sending.ticket)
        if not queue:
            del self.sending[target]
        if wrote:
            self.box.moves += 1
            self.box.ring()

    def _read(self, source: int, finished: list[Any]) -> None:
        head = self.plan.head(source, self.box.rank)
        tail = self.words[head + 8]
        read = False
        while tail < self.words[head]:
            at = self.plan.ring(source, self.box.rank, tail)
            tag, total, size, dtype = _HEAD.unpack_from(self.box.segment.raw, at)
            message = self._coming.get(source)
            if message is None:
                message = self._coming[source] = self._begin(source, tag, total, dtype)
            message.buffer[message.got : message.got + size].copy_(self.box.segment.bytes[at + 64 : at + 64 + size])
            tail += 1
            self.words[head + 8] = tail
            message.got += size
            read = True
            if message.got == total:
                del self._coming[source]
                if message.want is not None:
                    self.waiting.remove(message.want)
                    if message in self._aside:
                        self._aside.remove(message)
                    self._deliver(message)
                    finished.append(message.want.ticket)
        if read:
            self.box.moves += 1
            self.box.ring()

    def _begin(self, source: int, tag: int, total: int, dtype: bytes) -> _Message:
        taken = {id(message.want) for message in (*self._aside, *self._coming.values())}
        for want in self.waiting:
            if id(want) not in taken and _fits(want, source, tag):
                want.source = source
                message = _Message(source, tag, dtype, want.target, want)
                self._check(want, message, total)
                return message
        message = _Message(source, tag, dtype, torch.empty(total, dtype=torch.uint8), None)
        self._aside.append(message)
        return message

    def _check(self, want: Receiving, message: _Message, total: int | None = None) -> None:
        sent = message.buffer.numel() if total is None else total
        if (sent, message.dtype) != (want.target.numel(), want.dtype):
            name = self.names
            raise ShmError(
                f"rank {name[message.source]} sent {sent} bytes of {_text(message.dtype)} with tag {message.tag} to "
                f"rank {name[self.box.rank]}, which receives {want.target.numel()} bytes of {_text(want.dtype)} there"
            )

    def _deliver(self, message: _Message) -> None:
        want = message.want
        assert want is not None
        want.ticket.source = message.source
        if message.buffer is not want.target:
            want.target.copy_(message.buffer)


def _fits(want: Receiving, source: int, tag: int) -> bool:
    return want.tag == tag and want.source in (source, ANY)


def _text(dtype: bytes) -> str:
    return dtype.rstrip(b"\0").decode(errors="replace")
