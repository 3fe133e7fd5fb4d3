"""`send` and `recv`, which NCCL matches by their order between two ranks, whatever their tags."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .findings import Finding, ledger
from .lane import MismatchError
from .memory import Bytes, memory
from .order import Key
from .pending import Awaited, Pending
from .stuck import Waiting
from .transfer import Wire

_HEADER = 2048
_FIRST_TAG = 1 << 30


class Send(Pending):
    """A message that is being sent: a wait for it ends at once, as it does for the host on NCCL."""

    def result(self, seconds: float | None) -> Bytes:
        return np.empty(0, np.uint8)

    def is_done(self) -> bool:
        return True


class Receive(Awaited):
    """A message that is awaited. source: the sender's place in the group."""

    def __init__(self, what: str, out: Tensor, source: int, waiting: Callable[[str], Waiting]) -> None:
        super().__init__(what, [out], [], waiting)
        self.source = source


class Messages:
    """The messages of one group. names: the ranks as the program numbers them."""

    def __init__(self, wire: Wire, names: Sequence[int]) -> None:
        self._wire, self._names = wire, list(names)
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def send(self, pending: Send, x: Tensor, target: int, tag: int) -> None:
        """Send a copy; threads see to the rest."""
        number = self._sent[target]
        self._sent[target] += 1
        data = memory(x).copy()
        header = {"bytes": data.size, "dtype": str(x.dtype), "shape": list(x.shape), "tag": tag, "number": number}
        text = json.dumps({**header, "at": str(pending.started)[:600]})
        parts = [np.frombuffer(bytearray(text.encode().ljust(_HEADER)), np.uint8), data]
        tensors = [torch.from_numpy(part) for part in parts if part.size]
        gloo = self._wire.gloo
        works = [gloo.send([one], target, at) for one, at in zip(tensors, (0, _FIRST_TAG + number))]
        threading.Thread(target=_finish, args=(works, tensors), daemon=True).start()

    def receive(self, pending: Receive, x: Tensor, tag: int) -> None:
        """Await the next message of `pending.source`, on a thread of its own."""
        self._received[pending.source] += 1
        header = torch.empty(_HEADER, dtype=torch.uint8)
        work = self._wire.gloo.recv([header], pending.source, 0)
        wanted = {"bytes": x.numel() * x.element_size(), "dtype": str(x.dtype), "shape": list(x.shape), "tag": tag}
        threading.Thread(target=self._await, args=(pending, work, header, wanted), daemon=True).start()

    def sent(self, target: int) -> int:
        """How many messages have been sent to a rank."""
        return self._sent[target]

    def received(self, source: int) -> int:
        """How many messages of a rank have been awaited."""
        return self._received[source]

    def key(self, group: str, rank: int, other: int, sends: bool) -> Key:
        """What the message that comes next is called by both ranks."""
        source, target = (rank, other) if sends else (other, rank)
        number = (self._sent if sends else self._received)[other]
        names = self._names[source], self._names[target]
        return Key(group, names, f"message {number} from {names[0]} to {names[1]}")

    def _await(self, pending: Receive, work: Any, header: Tensor, wanted: dict[str, Any]) -> None:
        try:
            work.wait()
            found = json.loads(header.numpy().tobytes())
            if (found["bytes"], found["dtype"]) != (wanted["bytes"], wanted["dtype"]):
                raise MismatchError(
                    f"{pending.what} awaits {wanted['dtype']} {wanted['shape']}, and {found['dtype']} {found['shape']} "
                    f"was sent\n  awaited at {pending.started}\n  sent at {found['at']}"
                )
            if found["tag"] != wanted["tag"]:
                text = (
                    f"{pending.what} has tag {wanted['tag']}, what is sent to it tag {found['tag']}: NCCL has no tags"
                )
                ledger.find_later(Finding("refused by NCCL", f"{text}; sent at {found['at']}", pending.started))
            data = torch.empty(found["bytes"], dtype=torch.uint8)
            if data.numel():
                self._wire.gloo.recv([data], pending.source, _FIRST_TAG + found["number"]).wait()
            pending.brought = data.numpy()
        except MismatchError as error:
            pending.error = error
        except Exception as error:
            pending.error = RuntimeError(f"{pending.what} failed: {error}\n  started at {pending.started}")
        pending.done.set()


def _finish(works: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    for work in works:
        try:
            work.wait()
        except RuntimeError:
            return  # its receiver is gone, and says so itself
