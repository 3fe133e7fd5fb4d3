"""``@distributed``: the one thing a test file needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shardgrad.errors import shorten

F = TypeVar("F", bound=Callable[..., Any])

MARK = "shardgrad_ranks"
RANK_SUPPLIES = ("rank", "monkeypatch")


@dataclass(frozen=True)
class Ranks:
    """How to run a test: the arguments of ``@distributed``, carried to the plugin by a mark."""

    world_sizes: tuple[int, ...]
    timeout: float
    backend: str
    rank_supplies: tuple[str, ...]
    wants_world_size: bool


def distributed(world_size: int | Sequence[int], *, timeout: float = 60.0, backend: str = "gloo") -> Callable[[F], F]:
    """Runs a test function on every rank of a process group, once for each world size.

    The function runs in processes of its own, with ``torch.distributed`` initialised and one thread a rank;
    the test passes when it passes on every rank. Parameters and fixtures are made once, by pytest, and a
    copy is sent to every rank, so they must be picklable; setup, teardown and fixtures that act on the
    process itself do not reach the ranks. Three arguments are special, each optional: ``world_size``,
    ``rank``, and ``monkeypatch``, which is the rank's own.

    Args:
        world_size: number of ranks, or several, each a parameter of the test (``[ranks=2]`` in its id).
        timeout: seconds for the whole test, after which it fails and shows every rank's stack.
        backend: for ``torch.distributed.init_process_group``; the test module may register it. On "late" the test
            also fails for races and orders that GPUs would show (see `shardgrad.testing.late`).
            ``pytest --ranks-backend`` overrides it.

    Raises:
        TypeError, ValueError: at decoration, for arguments or functions that cannot be run on ranks.
    """
    sizes = _checked_sizes(world_size)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {shorten(repr(timeout))}")
    if not isinstance(backend, str) or not backend:
        raise TypeError(f"backend must name a torch.distributed backend, such as 'gloo', got {shorten(repr(backend))}")

    def mark(function: F) -> F:
        import pytest  # here, so that shardgrad.testing can be imported where pytest is not installed

        _check_function(function)
        signature = inspect.signature(function)
        wanted = signature.parameters
        supplies = tuple(name for name in RANK_SUPPLIES if name in wanted)
        ranks = Ranks(sizes, timeout, backend, supplies, "world_size" in wanted)
        # pytest makes the fixtures it reads in the signature. It is always shown world_size, so that this
        # parameter can vary and the test cannot pass without the plugin, and never what ranks supply.
        shown = [parameter for name, parameter in wanted.items() if name not in supplies]
        if not ranks.wants_world_size:
            shown.append(inspect.Parameter("world_size", inspect.Parameter.KEYWORD_ONLY))
        shown.sort(key=lambda parameter: parameter.kind)
        vars(function)["__signature__"] = signature.replace(parameters=shown)
        return getattr(pytest.mark, MARK)(ranks)(function)

    return mark


def _checked_sizes(world_size: int | Sequence[int]) -> tuple[int, ...]:
    if callable(world_size):
        raise TypeError("distributed needs a world size: @distributed(world_size=2), not @distributed")
    if isinstance(world_size, Sequence) and not isinstance(world_size, str):
        sizes = tuple(world_size)
    else:
        sizes = (world_size,)
    if not sizes:
        raise ValueError("world_size is empty: the test would never run")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"world_size must be an int or a list of ints, got {shorten(repr(world_size))}")
        if size < 1:
            raise ValueError(f"world_size must be at least 1, got {size}")
    if len(set(sizes)) != len(sizes):
        raise ValueError(f"world_size names a size twice: {shorten(list(sizes))}")
    return sizes


def _check_function(function: object) -> None:
    if not inspect.isfunction(function):
        raise TypeError(
            f"distributed decorates a test function, got {shorten(repr(function))}. "
            "In a class, decorate each test; put staticmethod above distributed."
        )
    name = function.__name__
    if any(mark.name == MARK for mark in getattr(function, "pytestmark", ())):
        raise TypeError(f"{name} is decorated with distributed twice: give one a list of world sizes")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{name} is async, and a rank would not await it: make it a plain function")
    if inspect.isgeneratorfunction(function):
        raise TypeError(f"{name} yields, and a rank would not run its body: make it a plain function")
