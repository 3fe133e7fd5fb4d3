"""A collective between its call and `wait()`: its results are poison, and what it was given is remembered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from .findings import Finding, ledger
from .memory import Bytes, is_freed, is_poisoned, memory, overlap, poison
from .place import here
from .stuck import DeadlockError, Waiting

Kept = tuple[Tensor, Bytes]


class Pending:
    """One that nobody has waited for.

    what: it, in words. outs: what it fills, dense. kept: what it was given, each with a copy of its bytes. A tensor
    that is both, such as the shard in a gather into the tensor that it is a part of, is no longer what was given.
    named: kinds of faults whose line is known already.
    """

    def __init__(self, what: str, outs: Sequence[Tensor], kept: Sequence[Kept]) -> None:
        self.what, self.started = what, here()
        self.outs = [out for out in outs if out.numel()]
        self.kept = [(x, copy) for x, copy in kept if x.numel() and not any(overlap(x, out) for out in self.outs)]
        self.settled = False
        self.named: set[str] = set()
        self._settling = threading.RLock()

    def result(self, seconds: float | None) -> Bytes:
        """The bytes for `outs`, one after another, once they are there."""
        raise NotImplementedError

    def is_done(self) -> bool:
        """Whether `result` would return at once."""
        raise NotImplementedError

    def begin(self) -> None:
        """Poison the results and remember this as under way."""
        for out in self.outs:
            poison(out)
        with ledger.lock:
            ledger.open[id(self)] = self

    def settle(self, seconds: float | None = None) -> None:
        """Wait for it, look whether the program has kept its hands off, and bring the results.

        Raises:
            RaceError: it has not, outside of `late_watch`.
        """
        result = self.result(seconds)
        with self._settling:
            if self.settled:
                return
            self.settled = True
            self.forget()
            found = [self._fault("written before wait", "a result", at) for at in self._written()]
            found += [self._fault("changed before wait", "what was given", at) for at in self._changed()]
            found += [self._fault("freed before wait", "a result", x) for x in self.outs if is_freed(x)]
            found += [self._fault("freed before wait", "what was given", x) for x, _ in self.kept if is_freed(x)]
            self.deliver(result)
            self.outs, self.kept = [], []
        for finding in found:
            if finding.kind not in self.named:
                ledger.find(finding)

    def deliver(self, result: Bytes) -> None:
        at = 0
        for out in self.outs:
            size = out.numel() * out.element_size()
            if not is_freed(out):
                memory(out)[:] = result[at : at + size]
            at += size

    def forget(self) -> None:
        with ledger.lock:
            ledger.open.pop(id(self), None)

    def drop(self) -> None:
        """Report that its work is gone without a wait. The results stay poison: nobody will ever know them arrived."""
        if not self.settled:
            self.settled = True
            self.forget()
            text = f"the work of {self.what} was dropped without wait()"
            ledger.find_later(Finding("dropped", text, self.started))

    def _written(self) -> list[Tensor]:
        return [out for out in self.outs if not is_poisoned(out)]

    def _changed(self) -> list[Tensor]:
        return [x for x, copy in self.kept if not is_freed(x) and bool((memory(x) != copy).any())]

    def _fault(self, kind: str, which: str, x: Tensor) -> Finding:
        verb = kind.partition(" ")[0]
        return Finding(kind, f"{which} {list(x.shape)} of {self.what} was {verb} before wait()", self.started, here())


class Awaited(Pending):
    """One that other ranks have a part in, done by a thread, which sets `done`. waiting: for one who waits long."""

    def __init__(
        self, what: str, outs: Sequence[Tensor], kept: Sequence[Kept], waiting: Callable[[str], Waiting]
    ) -> None:
        super().__init__(what, outs, kept)
        self._waiting = waiting
        self.done = threading.Event()
        self.error: Exception | None = None
        self.brought: Bytes = np.empty(0, np.uint8)

    def is_done(self) -> bool:
        return self.done.is_set()

    def result(self, seconds: float | None) -> Bytes:
        if seconds is None:
            try:
                self._waiting(f"{self.what}, started at {self.started}").until(self.done)
            except DeadlockError:
                self._end()
                raise
        elif not self.done.wait(seconds):
            raise RuntimeError(f"{self.what} took longer than {seconds:g} s; started at {self.started}")
        if self.error is not None:
            self._end()
            raise self.error
        return self.brought

    def _end(self) -> None:
        self.settled = True
        self.forget()
