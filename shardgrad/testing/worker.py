"""The process of one rank: it waits for tasks, runs each in the process group it needs, and replies.

Torch is imported once, and the process group kept from one task to the next where the task allows it: this
is what makes a test cost milliseconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import os
import pickle
import queue
import random
import shutil
import signal
import sys
import threading
import time
import unittest
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from .failure import describe
from .loading import load
from .membership import Membership
from .messages import READY, Call, Filter, Group, Reply, Status, Task


def main(connection: Connection[Any, Any], directory: str, rank: str) -> None:
    """Serves tasks until one is None or until the other end of the pipe is gone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # a rank that dies leaves what it printed
    stacks = open(os.path.join(directory, f"rank{rank}.stacks"), "ab")  # noqa: SIM115 - until the process ends
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    import torch

    torch.set_num_threads(1)
    inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, inbox, directory), daemon=True).start()
    connection.send(READY)
    membership = Membership(int(rank))
    while (task := inbox.get()) is not None:
        connection.send(run(task, membership, directory))
    membership.leave()


def listen(connection: Connection[Any, Any], inbox: queue.SimpleQueue[Task | None], directory: str) -> None:
    """Reads the pipe on a thread of its own, so that a rank busy in a test sees its parent go."""
    try:
        while True:
            task = connection.recv()
            inbox.put(task)
            if task is None:
                return
    except (EOFError, OSError):
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)


def run(task: Task, membership: Membership, directory: str) -> Reply:
    """Runs one task; whatever it raises becomes the reply. directory: as of `load`."""
    call = task.call
    try:
        sys.path[:] = call.sys_path
        os.chdir(call.directory)
        with _filtered(call.filters):
            function = load(call.target, call.rewrite_asserts, directory)
            args = [_unpickled(str(position), value) for position, value in enumerate(call.args)]
            kwargs = {name: _unpickled(repr(name), value) for name, value in call.kwargs.items()}
        membership.enter(task.group)
        _seed()
        with _filtered(call.filters), _watched(task.group), _supplied(call, membership.rank) as supplied:
            value = function(*args, **kwargs, **supplied)
        return Reply("passed", value=_pickled_result(value), group_intact=membership.is_intact())
    except BaseException as error:  # SystemExit and pytest's outcomes too: none of them may end the process
        when = time.monotonic()
        summary, text, variables = describe(error)
        status = _status(error)
        return Reply(status, summary if status == "failed" else str(error), text, variables, when=when)


def _seed() -> None:
    """Every task starts from the same random state, on all ranks, whatever ran before it."""
    import torch

    torch.manual_seed(0)
    random.seed(0)


def _status(error: BaseException) -> Status:
    pytest = sys.modules.get("pytest")  # if it was not imported, its outcomes were not raised
    if isinstance(error, unittest.SkipTest) or (pytest and isinstance(error, pytest.skip.Exception)):
        return "skipped"
    return "xfailed" if pytest and isinstance(error, pytest.xfail.Exception) else "failed"


def _watched(group: Group) -> contextlib.AbstractContextManager[object]:
    """A test on the late backend fails for what it does wrong there, whatever it asserts."""
    if group.backend != "late":
        return contextlib.nullcontext()
    from .late import late_watch

    return late_watch()


@contextlib.contextmanager
def _supplied(call: Call, rank: int) -> Iterator[dict[str, object]]:
    """The arguments that only the rank can make; a monkeypatch is undone when the test ends."""
    with contextlib.ExitStack() as stack:
        supplied: dict[str, object] = {}
        if "rank" in call.rank_supplies:
            supplied["rank"] = rank
        if "monkeypatch" in call.rank_supplies:
            import pytest

            supplied["monkeypatch"] = stack.enter_context(pytest.MonkeyPatch.context())
        yield supplied


@contextlib.contextmanager
def _filtered(filters: tuple[Filter, ...]) -> Iterator[None]:
    """The caller's warning filters, and so pytest's ``filterwarnings``, in the caller's order."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for rule in filters:
            try:
                category: Any = importlib.import_module(rule.category[0])
                for part in rule.category[1].split("."):
                    category = getattr(category, part)
            except (ImportError, AttributeError):
                continue  # a category that does not exist here is never warned about here
            action: Any = rule.action
            warnings.filterwarnings(action, rule.message, category, rule.module, rule.line, append=True)
        yield


def _unpickled(name: str, value: bytes) -> object:
    try:
        return pickle.loads(value)
    except Exception as error:
        raise TypeError(f"argument {name} was pickled, but cannot be unpickled on a rank") from error


def _pickled_result(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(f"the function returned a {type(value).__name__}, which cannot be pickled") from error
