"""A collective between its call and `wait()`: its results are poison, and what it was given is remembered."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import Tensor

from .findings import Finding, ledger
from .memory import Bytes, is_freed, is_poisoned, memory, overlap, poison
from .place import here

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

    def _written(self) -> list[str]:
        return [_shape(out) for out in self.outs if not is_poisoned(out)]

    def _changed(self) -> list[str]:
        return [_shape(x) for x, copy in self.kept if not is_freed(x) and bool((memory(x) != copy).any())]

    def _fault(self, kind: str, which: str, shape: str) -> Finding:
        verb = "written" if kind == "written before wait" else "changed"
        return Finding(kind, f"{which} {shape} of {self.what} was {verb} before wait()", self.started, here())


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
