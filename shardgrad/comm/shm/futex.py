"""Sleep until a word of shared memory changes, wake the sleepers, and the fence that goes before publishing."""

from __future__ import annotations

import ctypes
import threading

_SYS_FUTEX = 202  # x86-64, the only processor we run on
_WAIT, _WAKE = 0, 1  # without FUTEX_PRIVATE: between processes

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_lock = threading.Lock()


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def fence() -> None:
    """Make all earlier stores of this thread visible before any later load or store.

    CPython takes a free Lock with a locked instruction: sem_trywait's `lock cmpxchg` up to 3.12, PyMutex's from 3.13.
    On x86-64 a locked instruction drains the store buffer, and the write-combining buffers too, so it also orders the
    non-temporal stores that a large copy may use, which plain stores do not. (A copy that several threads did has each
    thread pass a locked instruction at the end of its part: the join of the parallel region.) If another thread holds
    the lock just then, the failed attempt is a locked instruction as well.
    """
    if _lock.acquire(False):
        _lock.release()


def wait(address: int, value: int, seconds: float) -> None:
    """Sleep until woken, at most so long; at once back if the 32-bit word is not `value` any more."""
    whole = int(seconds)
    limit = _Timespec(whole, int((seconds - whole) * 1e9))
    _syscall(
        ctypes.c_long(_SYS_FUTEX),
        ctypes.c_void_p(address),
        ctypes.c_int(_WAIT),
        ctypes.c_int(value),
        ctypes.byref(limit),
        ctypes.c_void_p(0),
        ctypes.c_int(0),
    )


def wake(address: int) -> None:
    """Wake all that sleep on the word."""
    _syscall(
        ctypes.c_long(_SYS_FUTEX),
        ctypes.c_void_p(address),
        ctypes.c_int(_WAKE),
        ctypes.c_int(0x7FFFFFFF),
        ctypes.c_void_p(0),
        ctypes.c_void_p(0),
        ctypes.c_int(0),
    )
