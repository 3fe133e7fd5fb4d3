"""The pool without pytest: for a script, or to try something out."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any


class RankError(RuntimeError):
    """A function did not return on every rank; the message says what each rank did."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: object, timeout: float = 60.0, backend: str = "gloo"
) -> list[Any]:
    """Runs ``function(*args)`` on every rank of a new process group and returns the results, in rank order.

    Each call starts processes, which import torch: seconds. The ranks import the function's module by its
    file, so it must have one, and a script calls this under ``if __name__ == "__main__"``. Arguments and
    results are pickled.

    Raises:
        RankError: with every failing rank's traceback, and the stacks of those that did not finish.
        TypeError: for a function or an argument that cannot be sent.
    """
    from shardgrad.errors import shorten

    from .call import build_call, find_target
    from .pool import Pool
    from .report import echo, judge

    module = sys.modules.get(getattr(function, "__module__", ""))
    qualname = getattr(function, "__qualname__", "<unnamed>")
    if module is None or "<" in qualname:
        raise TypeError(f"the ranks cannot import {shorten(repr(function))}: it must stand at the top level of a file")
    call = build_call(find_target(module, qualname), args)
    with Pool() as pool:
        replies = pool.run(call, world_size, backend=backend, timeout=timeout)
    echo(replies)
    verdict, text = judge(replies, timeout)
    if verdict != "passed":
        raise RankError(text)
    return [pickle.loads(reply.value) for reply in replies]
