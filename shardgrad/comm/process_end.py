"""How a process ends that has used gloo, whose threads work behind the program."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
from typing import Any


@functools.cache
def pause_at_exit() -> None:
    """Keep the interpreter for a moment. A gloo thread lets go of a collective's tensors a little after `wait` has
    returned, and needs the interpreter lock for it. If the interpreter ends first, the thread takes the process down
    ("terminate called without an active exception"), measured on two busy cores in 3 of 14 runs of a program that ends
    right after a backward; with this pause, in none of 14."""
    atexit.register(time.sleep, 0.05)


def end_at_exit(work: Any) -> None:
    """For a collective that will never end: the interpreter would wait for gloo's thread, and so for the collective's
    own timeout. The process ends with status 1 when the program has."""
    atexit.register(_end_unless_completed, work)


def _end_unless_completed(work: Any) -> None:
    if not work.is_completed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
