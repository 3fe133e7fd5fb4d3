"""Questions to the store of the default process group, with a limit: whoever keeps it may be dead or frozen.

A question to a store that does not answer never returns, and no argument of torch's makes it. So a thread puts it, and
its caller waits for the thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from shardgrad.errors import CollectiveError

SILENT_S = 12.0
"""How long a store may take for an answer before its keeper counts as dead or frozen."""

T = TypeVar("T")


class StoreError(CollectiveError):
    """The store does not answer, or is gone."""


class SilentStore(StoreError):
    """The store does not answer."""


class Question(Generic[T]):
    """A function of the store that a thread calls at once, with this question for its argument.

    given_up: whether the caller has gone: a function that asks more than once ends then.
    heard: when such a function last had an answer.
    """

    def __init__(self, put: Callable[[Question[T]], T]) -> None:
        self.given_up, self.heard = False, time.monotonic()
        self._answered = threading.Event()
        self._answer: list[T] = []
        self._error: BaseException | None = None
        self._put = put
        # A daemon: one whose store is silent must not keep the process.
        threading.Thread(target=self._ask, name="shardgrad-ask", daemon=True).start()

    def _ask(self) -> None:
        try:
            self._answer.append(self._put(self))
        except BaseException as error:
            self._error = error
        self._answered.set()

    def wait(self, seconds: float) -> bool:
        """Whether there is an answer within so many seconds."""
        return self._answered.wait(seconds)

    @property
    def answer(self) -> T:
        """What the function returned, once `wait` has said that it has.

        Raises:
            StoreError: the store is gone.
        """
        if self._error is None:
            return self._answer[0]
        if isinstance(self._error, RuntimeError) and not isinstance(self._error, CollectiveError):
            raise StoreError(lost_store(self._error))
        raise self._error


def ask(put: Callable[[], T], seconds: float = SILENT_S) -> T:
    """What a function of the store returns.

    Raises:
        StoreError: the store does not answer within so many seconds, or is gone; names who keeps it.
    """
    question = Question(lambda _: put())
    if not question.wait(seconds):
        question.given_up = True
        raise SilentStore(silent_store(seconds))
    return question.answer


def lost_store(error: BaseException) -> str:
    """What to say of a store to which the connection broke."""
    return f"the store, which {keeper()} keeps, is gone: its keeper died, or was ended ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """What torch says of an error, without the frames behind it."""
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def read(store: Any, key: str) -> str | None:
    """The text of a key; None if it has none."""
    return store.get(key).decode() if store.check([key]) else None


def silent_store(seconds: float) -> str:
    """What to say of a store that has not answered for so long."""
    return f"the store, which {keeper()} keeps, has not answered for {seconds:g} s: its keeper is stopped, or cut off"


def kept_by_torchrun() -> bool:
    """Whether torchrun's agent keeps the store of the default process group, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def keeper() -> str:
    """Who keeps the store of the default process group, in words."""
    where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ)
    who = "torchrun" if kept_by_torchrun() else "rank 0"
    return f"{who} (at {where})" if where else who
