"""What torch gets for an operation: something to wait for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm.shm.progress import progress
from shardgrad.comm.shm.queue import Queue, Ticket


class ShmWork(dist.Work):
    """One operation, or several that torch counts as one.

    tickets: of what had not ended when it was made. results: torch's.
    """

    def __init__(self, queue: Queue, tickets: Sequence[Ticket], results: list[Tensor]) -> None:
        super().__init__()
        self._queue, self._tickets, self._results = queue, tickets, results
        self._future: torch.futures.Future[Any] | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Move the operation on until it is done; a positive timeout shortens that of the group.

        Raises:
            ShmError: it failed, or took too long.
        """
        seconds = timeout.total_seconds() if timeout else 0.0
        for ticket in self._tickets:
            ticket.wait(seconds if seconds > 0 else None)
        return True

    def is_completed(self) -> bool:
        if self._pending():
            self._queue.poll()
        return not self._pending()

    def _pending(self) -> bool:
        return any(not ticket.done and ticket.error is None for ticket in self._tickets)

    def is_success(self) -> bool:
        return all(ticket.done for ticket in self._tickets)

    def exception(self) -> BaseException | None:
        return next((ticket.error for ticket in self._tickets if ticket.error is not None), None)

    def result(self) -> list[Tensor]:
        return self._results

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        return self._tickets[0].source

    _source_rank = source_rank  # torch's recv calls it by this name

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the list of tensors; the progress thread fulfils it, or a wait for a later operation."""
        if self._future is None:
            future: torch.futures.Future[Any] = torch.futures.Future()
            self._future = future

            def settle() -> None:
                # Called once for each ticket, perhaps by two threads: only the last one finds nothing pending.
                with self._queue.settling:
                    if self._pending() or future.done():
                        return
                    error = self.exception()
                    if error is None:
                        future.set_result(self.result())
                    else:
                        future.set_exception(error)

            for ticket in self._tickets:
                ticket.callbacks.append(settle)
            if self._pending():
                progress.watch(self._queue, now=True)
            else:
                settle()
        return self._future
