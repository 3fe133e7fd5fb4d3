"""What torch gets for a collective that has been started."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm import shim

from .pending import Pending

FUTURE_S = 0.005
"""How much later than its data a future is done that C++ waits in, where nobody sees the wait begin."""


class LateWork(dist.Work):
    """Of one collective or message; without `pending` it had ended when it was made, as after `async_op=False`."""

    def __init__(self, pending: Pending | None, results: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._pending, self._results = pending, list(results)
        self._future: torch.futures.Future[Any] | None = None

    @shim.untraced
    def wait(self, timeout: timedelta | None = None) -> bool:
        """Bring the results. Until here they are poison.

        Raises:
            RaceError: the program has touched them, or changed what it gave, outside of `late_watch`.
            MismatchError: the ranks do not call the same.
        """
        if self._pending is not None:
            seconds = timeout.total_seconds() if timeout else 0.0
            with shim.no_modes():
                self._pending.settle(seconds if seconds > 0 else None)
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        """Whether the data have come. They are visible after `wait()` alone, as on NCCL."""
        return self._pending is None or self._pending.settled or self._pending.is_done()

    def is_success(self) -> bool:
        return self.is_completed()

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self._results

    def source_rank(self) -> int:
        return int(getattr(self._pending, "source", -1))

    _source_rank = source_rank  # torch's recv calls it by this name

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the results: a wait in Python brings them; for C++ (DDP) a thread does, a little later."""
        if self._future is None:
            self._future = _Future(self.wait)
            if self._pending is None:
                self._future.set_result(self._results)
            else:
                threading.Thread(target=self._fulfil, args=(self._future,), daemon=True).start()
        return self._future

    def _fulfil(self, future: torch.futures.Future[Any]) -> None:
        assert self._pending is not None
        try:
            self._pending.result(None)
            _pause(FUTURE_S)
            self.wait()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(self._results)

    def __del__(self) -> None:
        pending = getattr(self, "_pending", None)
        if pending is not None:
            pending.drop()


class _Future(torch.futures.Future):
    def __init__(self, settle: Callable[[], Any]) -> None:
        super().__init__()
        self._settle = settle

    def wait(self) -> Any:
        self._settle()
        return super().wait()


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)
