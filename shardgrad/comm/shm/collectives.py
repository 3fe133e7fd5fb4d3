"""Each collective as rounds: what a rank writes into its slot, and what it then reads out of the others'.

`rounds` is the same on all ranks, for they agree on what they do: every rank says its `header` in the first round and
compares it with everyone's. Tensors are flat and contiguous; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from torch import Tensor

from shardgrad.comm.shm.mailbox import Mailbox
from shardgrad.comm.shm.reduce import Reduction
from shardgrad.comm.shm.segment import HEADER, SLOT

ONCE = 256 * 1024  # bytes that an all-reduce reads from other ranks to reduce all by itself, in one round
_LINE = 64


@lru_cache(maxsize=4096)
def header(text: str) -> bytes:
    """What the ranks compare, ended by a zero so that none begins another."""
    raw = text.encode()
    return raw[: HEADER - 1] + b"\0"


def _rounds(bytes_in_all: int, bytes_in_one: int) -> int:
    return max(1, -(-bytes_in_all // bytes_in_one))


def _part(flat: Tensor, start: int, count: int) -> Tensor:
    """Elements [start, start + count) as far as they exist; the tensor itself where that is all of it."""
    if start == 0 and count >= flat.numel():
        return flat
    return flat[start : start + count]


class Meeting:
    """A barrier: a round in which nothing is written.

    what: in words, which the ranks compare. rounds: how many there are. open_ended: whether reading the first round may
    show that there are more. round: the one that this rank is in. posted: whether it has done its part of it.
    """

    open_ended = False

    def __init__(self, text: str) -> None:
        self.what, self.header, self.rounds = text, header(text), 1
        self.round, self.posted = 0, False

    @property
    def given(self) -> bool:
        """Whether this rank has done its part of the last round."""
        return self.posted and self.round + 1 >= self.rounds and not self.open_ended

    def write(self, i: int, box: Mailbox) -> None:
        pass

    def read(self, i: int, box: Mailbox) -> None:
        pass


class Spread(Meeting):
    """Ranks publish a tensor, and others read it whole: all-gather, broadcast, gather.

    source: what this rank publishes, if it does. targets: by rank, where what it published goes.
    longest: elements in the longest tensor that any rank publishes.
    """

    def __init__(
        self, text: str, source: Tensor | None, targets: Mapping[int, Tensor], longest: int, size: int
    ) -> None:
        super().__init__(text)
        self.source, self.targets = source, targets
        self.chunk = SLOT // size
        self.rounds = _rounds(longest, self.chunk)

    def write(self, i: int, box: Mailbox) -> None:
        if self.source is not None:
            _put(self.source, i * self.chunk, self.chunk, box, 0)

    def read(self, i: int, box: Mailbox) -> None:
        for rank, target in self.targets.items():
            if rank != box.rank:
                _take(target, i * self.chunk, self.chunk, box, rank, 0)
            elif i == 0 and self.source is not None and target.data_ptr() != self.source.data_ptr():
                target.copy_(self.source)


def _put(source: Tensor, start: int, count: int, box: Mailbox, at: int) -> None:
    part = _part(source, start, count)
    if n := part.numel():
        box.slot(box.rank, part.dtype, at, n).copy_(part)


def _take(target: Tensor, start: int, count: int, box: Mailbox, rank: int, at: int) -> None:
    part = _part(target, start, count)
    if n := part.numel():
        part.copy_(box.slot(rank, part.dtype, at, n))


class Parcels(Meeting):
    """Each rank publishes another tensor for each rank: all-to-all, scatter. A slot has an area for each addressee.

    sources, targets: by rank, what goes to it and where what comes from it goes.
    longest: elements in the longest parcel of any rank; None if only its sender and its addressee know, in which case
    the ranks exchange the lengths in the first round.
    """

    def __init__(
        self,
        text: str,
        sources: Mapping[int, Tensor],
        targets: Mapping[int, Tensor],
        longest: int | None,
        size: int,
        ranks: int,
    ) -> None:
        super().__init__(text)
        self.sources, self.targets, self.longest = sources, targets, longest
        self.open_ended = longest is None
        self.area = SLOT // ranks // _LINE * _LINE
        self.chunk = self.area // size
        self.rounds = _rounds(longest or 0, self.chunk)

    def write(self, i: int, box: Mailbox) -> None:
        if i == 0 and self.longest is None:
            box.say_splits([self.sources[r].numel() for r in range(box.ranks)])
        for rank, source in self.sources.items():
            if rank != box.rank:
                _put(source, i * self.chunk, self.chunk, box, rank * self.area)

    def read(self, i: int, box: Mailbox) -> None:
        if i == 0 and self.longest is None:
            self.rounds = _rounds(self._longest_of_all(box), self.chunk)
        for rank, target in self.targets.items():
            if rank != box.rank:
                _take(target, i * self.chunk, self.chunk, box, rank, box.rank * self.area)
            elif i == 0:
                target.copy_(self.sources[rank])

    def _longest_of_all(self, box: Mailbox) -> int:
        longest = 0
        for rank in range(box.ranks):
            counts = box.splits(rank)
            if counts[box.rank] != self.targets[rank].numel():
                raise WrongSplit(rank, counts[box.rank], self.targets[rank].numel())
            longest = max(longest, *counts)
        return longest


class WrongSplit(Exception):
    """An addressee expects another length than the sender sends."""

    def __init__(self, sender: int, sent: int, expected: int) -> None:
        super().__init__(sender, sent, expected)
        self.sender, self.sent, self.expected = sender, sent, expected


class ReduceScatter(Meeting):
    """Each rank reduces one part of all ranks' tensors. Parts may differ in length."""

    def __init__(self, text: str, parts: Sequence[Tensor], out: Tensor, by: Reduction) -> None:
        super().__init__(text)
        self.parts, self.out, self.by = parts, out, by
        self.area = SLOT // len(parts) // _LINE * _LINE
        self.chunk = self.area // out.element_size()
        self.rounds = _rounds(max(part.numel() for part in parts), self.chunk)

    def write(self, i: int, box: Mailbox) -> None:
        for rank in box.others:
            _put(self.parts[rank], i * self.chunk, self.chunk, box, rank * self.area)

    def read(self, i: int, box: Mailbox) -> None:
        out = _part(self.out, i * self.chunk, self.chunk)
        if n := out.numel():
            mine = _part(self.parts[box.rank], i * self.chunk, self.chunk)
            at = box.rank * self.area
            self.by.into(out, [mine if r == box.rank else box.slot(r, out.dtype, at, n) for r in range(box.ranks)])


class Reduce(Meeting):
    """One rank reduces everyone's tensor; the others' stay as they are."""

    def __init__(self, text: str, tensor: Tensor, root: int, by: Reduction) -> None:
        super().__init__(text)
        self.tensor, self.root, self.by = tensor, root, by
        self.chunk = SLOT // tensor.element_size()
        self.rounds = _rounds(tensor.numel(), self.chunk)

    def write(self, i: int, box: Mailbox) -> None:
        if box.rank != self.root:
            _put(self.tensor, i * self.chunk, self.chunk, box, 0)

    def read(self, i: int, box: Mailbox) -> None:
        if box.rank == self.root:
            out = _part(self.tensor, i * self.chunk, self.chunk)
            if n := out.numel():
                parts = [out if r == box.rank else box.slot(r, out.dtype, 0, n) for r in range(box.ranks)]
                self.by.into(out, parts)


class AllReduceAtOnce(Meeting):
    """A small all-reduce: every rank reads everything and reduces it by itself, each in the same order.

    places: the slots of all ranks, as such tensors, of even and of odd rounds.
    """

    def __init__(self, text: str, tensor: Tensor, by: Reduction, places: Sequence[Sequence[Tensor]]) -> None:
        super().__init__(text)
        self.tensor, self.by, self.places = tensor, by, places

    def write(self, i: int, box: Mailbox) -> None:
        self.places[box.round & 1][box.rank].copy_(self.tensor)

    def read(self, i: int, box: Mailbox) -> None:
        self.by.into(self.tensor, self.places[box.round & 1])


class AllReduce(Meeting):
    """A large all-reduce: of each chunk a rank reduces one slice and publishes it, one round later, for all.

    Round i carries chunk i's inputs and chunk i-1's results, so that k chunks take k+1 rounds, not 2k.
    """

    def __init__(self, text: str, tensor: Tensor, by: Reduction, ranks: int) -> None:
        super().__init__(text)
        self.tensor, self.by, self.ranks = tensor, by, ranks
        size = tensor.element_size()
        self.results = SLOT * ranks // (ranks + 1) // (_LINE * ranks) * _LINE * ranks  # they begin after the inputs
        self.chunk = self.results // size
        self.chunks = _rounds(tensor.numel(), self.chunk)
        self.rounds = self.chunks + 1

    def _slice(self, i: int, rank: int) -> tuple[int, int]:
        """Where chunk i's slice that a rank reduces begins in the tensor, and how long it is."""
        start = i * self.chunk
        whole = min(self.chunk, self.tensor.numel() - start)
        each = -(-whole // self.ranks)
        first = min(rank * each, whole)
        return start + first, min(each, whole - first)

    def write(self, i: int, box: Mailbox) -> None:
        if i == self.chunks:
            return
        size = self.tensor.element_size()
        for rank in box.others:
            start, count = self._slice(i, rank)
            if count:
                at = (start - i * self.chunk) * size
                box.slot(box.rank, self.tensor.dtype, at, count).copy_(self.tensor[start : start + count])

    def read(self, i: int, box: Mailbox) -> None:
        dtype, size = self.tensor.dtype, self.tensor.element_size()
        if i > 0:
            for rank in box.others:
                start, count = self._slice(i - 1, rank)
                if count:
                    self.tensor[start : start + count].copy_(box.slot(rank, dtype, self.results, count))
        if i < self.chunks:
            start, count = self._slice(i, box.rank)
            if count:
                at = (start - i * self.chunk) * size
                mine = self.tensor[start : start + count]
                parts = [mine if r == box.rank else box.slot(r, dtype, at, count) for r in range(box.ranks)]
                # Straight into the slot of the next round, which no rank reads any more: see the mailbox.
                result = box.slot(box.rank, dtype, self.results, count, ahead=1)
                self.by.into(result, parts)
                mine.copy_(result)
