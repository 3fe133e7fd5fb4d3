"""What all tests share: where their helpers lie, in how many processes they run, and which world sizes each time.

Helpers (`layouts`, `exact`, `plain`) can be imported by name from every folder below.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "nn")]

# Before torch is imported, and for commands too: the tests' processes share the cores, and threads that wait spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ALWAYS = (2, 3)
"""Of a test on several world sizes, these are run each time. Where it is run on both, each set of its parameters is run
on one of them each time, in turns, and on the other one with the slow tests."""

SWEEP = 5
"""Of its other sizes, one set of parameters in so many is run each time, and the rest is slow."""


SAMPLE = 5
"""Of a test of models on 2 ranks, one set of parameters in so many is run each time."""


ON_TWO = ("test_compile", "test_parallel")
"""Of these modules, whose tests take seconds for each rank, those on 2 ranks are run each time."""


EXACT = 3
"""Of a test of exact mode on 4 ranks, which compares all meshes of up to so many, likewise one in so many."""


MANY = 4
"""So many ranks are slow where two or three are run too."""


LARGE = 8
"""So many ranks are more than most machines have cores: slow."""


RARE = 4
"""Of the parameters of a slow test on ranks one set in so many is run with the slow tests, at each world size. The
others are `rare` (`-m "slow or rare"`). Parameters of `tests/mutants` are each a room of its own, and all are run."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite, none beside pytest's own where files or folders were asked for."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _mark_what_only_repeats(items)
    if hasattr(config, "workerinput"):
        # Of two processes, each of which begins with a half, the first then begins with what imports transformers and
        # what forks, which the second and its ranks need not do, and with what needs no ranks.
        items.sort(key=lambda item: (not _needs_much(item), _world_size(item) is not None))


def pytest_collection_finish() -> None:
    """Modules and tests stay: collections of garbage need not look through them."""
    gc.freeze()


def _mark_what_only_repeats(items: list[pytest.Item]) -> None:
    """Marks as slow what shows a property at a world size where a part of its parameters shows it too."""
    sizes: dict[str, set[int]] = defaultdict(set)
    for item in items:
        if size := _world_size(item):
            sizes[_function(item)].add(size)
    seen: dict[tuple[str, int], int] = defaultdict(int)
    halves: dict[tuple[str, int], int] = defaultdict(int)
    for item in items:
        size = _world_size(item)
        many = size == MANY and sizes[_function(item)] & set(ALWAYS)  # what is shown on fewer ranks as well
        if size is not None and (size >= LARGE or many):
            item.add_marker(pytest.mark.slow)
        on_two = item.path.stem in ON_TWO and size not in (None, 2) and 2 in sizes[_function(item)]
        if on_two or _other_half(item, size, sizes, halves):
            item.add_marker(pytest.mark.slow)
        models = "models" in item.path.parts and size is not None
        exact = item.path.stem.startswith("test_exact") and size is not None and size >= 3  # for many meshes each
        if not models and not exact and (size is None or size in ALWAYS or not sizes[_function(item)] & set(ALWAYS)):
            continue
        if exact and item.get_closest_marker("slow"):
            continue
        at = seen[_function(item), size or 0]
        seen[_function(item), size or 0] += 1
        # Models of transformers are dear, and so is a process that imports it: a sample of them each time, on 2 ranks.
        if (models and size != 2) or at % (SAMPLE if models else EXACT if exact else SWEEP):
            item.add_marker(pytest.mark.slow)
    _mark_what_is_rare(items)


def _other_half(
    item: pytest.Item, size: int | None, sizes: dict[str, set[int]], seen: dict[tuple[str, int], int]
) -> bool:
    """Whether the test's parameters are run each time on the other of the two world sizes. seen: how many sets of its
    function's parameters came before, at each size."""
    if size not in ALWAYS or not sizes[_function(item)].issuperset(ALWAYS) or len(item.callspec.params) == 1:
        return False
    seen[_function(item), size] += 1
    return (seen[_function(item), size] + ALWAYS.index(size)) % len(ALWAYS) == 0


def _mark_what_is_rare(items: list[pytest.Item]) -> None:
    """Marks as rare, too, what of the slow tests repeats others at most cost."""
    seen: dict[tuple[str, int], int] = defaultdict(int)
    for item in items:
        size = _world_size(item)
        if size is None or not item.get_closest_marker("slow") or "mutants" in item.path.parts:
            continue
        seen[_function(item), size] += 1
        if (seen[_function(item), size] - 1) % RARE:
            item.add_marker(pytest.mark.rare)


def _needs_much(item: pytest.Item) -> bool:
    """Whether the test is of a file that imports transformers in some tests, or forks from a process that has."""
    transformers = "models" in item.path.parts or item.path.stem == "test_transformers"
    return transformers or hasattr(getattr(item, "module", None), "forked")


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _world_size(item: pytest.Item) -> int | None:
    """The ranks that a test runs on, None if it needs none."""
    callspec = getattr(item, "callspec", None)
    ranked = item.get_closest_marker("shardgrad_ranks") is not None
    return callspec.params.get("world_size") if ranked and callspec else None
