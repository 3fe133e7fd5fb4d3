"""What the late backend (`shardgrad.testing.late`) needs of torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def all_to_all_of(group: Any) -> Any:
    """That which swaps parts of one tensor: `(out, whole, out_splits, in_splits, options) -> work`."""
    return getattr(group, "all_to_all_single", None) or group.alltoall_base


@contextmanager
def no_modes() -> Iterator[None]:
    """A block whose operations no mode sees, neither of PyTorch's dispatcher nor of its functions."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield


def batch_of_messages() -> bool:
    """Whether the message that is being started belongs to the same call of `batch_isend_irecv` as the one before it.

    Torch tells backends in Python nothing of a batch: it is read from the function's own count of works.
    """
    frame: Any = sys._getframe(1)
    for _ in range(12):
        if frame is None:
            return False
        if frame.f_code.co_name == "batch_isend_irecv":
            return len(frame.f_locals.get("reqs", ())) > 0
        frame = frame.f_back
    return False
