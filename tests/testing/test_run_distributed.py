"""The decorator, `run_distributed` and what reports are made of, without a run of pytest."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardgrad.testing import RankError, distributed, loading, run_distributed
from shardgrad.testing.report import name_ranks
from shardgrad.testing.stack import read_stacks


def test_the_plugin_is_light() -> None:
    """Every pytest run of an environment that has shardgrad imports it."""
    code = """if True:
        import sys
        import shardgrad.testing.plugin
        print({"torch", "numpy", "multiprocessing"} & set(sys.modules))
    """
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert output.stdout == "set()\n", output.stderr


@distributed(world_size=2)
@pytest.mark.parametrize("again", [False, True])
def test_every_test_starts_from_the_same_random_state_on_all_ranks(world_size: int, again: bool) -> None:
    import torch

    drawn = torch.rand(())
    torch.manual_seed(0)
    assert drawn == torch.rand(())


def test_one_rank_compiles_a_module_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, made = tmp_path / "module.py", tmp_path / "made"
    made.mkdir()
    module.write_text("x = 1\nassert x == 1\n")
    compiled: list[str] = []
    compile_ = loading._compiled
    monkeypatch.setattr(loading, "_compiled", lambda path, source: compiled.append(path) or compile_(path, source))

    def code() -> object:
        return loading._RewritingLoader("module", str(module), str(made)).get_code("module")

    first = code()
    assert (code(), len(compiled)) == (first, 1)
    (kept,) = made.iterdir()
    kept.write_bytes(kept.read_bytes()[:20])  # of a rank that was killed
    assert (code(), code(), len(compiled)) == (first, first, 2)
    module.write_text("x = 2\n")
    assert code() != first


def _plain() -> None: ...


async def _async() -> None: ...


def _generator():  # type: ignore[no-untyped-def]
    yield


@pytest.mark.parametrize(
    ("error", "message", "use"),
    [
        (ValueError, "world_size must be at least 1, got 0", lambda: distributed(0)),
        (ValueError, "world_size must be at least 1, got -2", lambda: distributed([1, -2])),
        (ValueError, "world_size is empty", lambda: distributed([])),
        (ValueError, "names a size twice", lambda: distributed([2, 2])),
        (TypeError, "must be an int or a list of ints", lambda: distributed("2")),
        (TypeError, "must be an int or a list of ints", lambda: distributed(True)),
        (TypeError, "not @distributed", lambda: distributed(_plain)),
        (ValueError, "timeout must be a positive number", lambda: distributed(2, timeout=0)),
        (TypeError, "backend must name", lambda: distributed(2, backend=None)),
        (TypeError, "decorate each test", lambda: distributed(2)(Path)),
        (TypeError, "_async is async", lambda: distributed(2)(_async)),
        (TypeError, "_generator yields", lambda: distributed(2)(_generator)),
        (TypeError, "distributed twice", lambda: distributed(2)(distributed(3)(_plain))),
    ],
)
def test_wrong_use(error: type[Exception], message: str, use: Callable[[], object]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        use()


def _sum_of_ranks(factor: int, fail_on: int | None = None) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    if dist.get_rank() == fail_on:
        raise ValueError("as told")
    x = torch.tensor(dist.get_rank() * factor)
    dist.all_reduce(x)
    return dist.get_rank(), int(x)


@pytest.mark.slow
def test_run_distributed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_distributed(_sum_of_ranks, 2, 10) == [(0, 10), (1, 10)]
    with pytest.raises(RankError, match="1 of 1 ranks failed, rank 0: ValueError: as told"):
        run_distributed(_sum_of_ranks, 1, 10, 0)
    with pytest.raises(TypeError, match="top level of a file"):
        run_distributed(lambda: 0, 2)


def test_name_ranks() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([0, 1]) == "ranks 0-1"
    assert name_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_read_stacks_puts_the_thread_of_the_test_first() -> None:
    import shardgrad.testing.worker as worker

    text = f"""Thread 0x00007f31c173e6c0 (most recent call first):
  File "/lib/connection.py", line 395 in _recv
  File "{worker.__file__}", line 58 in listen

Thread 0x00007f31c173e6c1 (most recent call first):
  File "/lib/autograd.py", line 9 in engine

Current thread 0x00007f31e0e9cb80 (most recent call first):
  File "/tests/test_a.py", line 29 in test_a
  File "{worker.__file__}", line 115 in run
  File "{worker.__file__}", line 50 in main
  File "<string>", line 1 in <module>
"""
    place, stacks = read_stacks(text)
    assert place == "test_a (test_a.py:29)"
    assert stacks == (
        'Current thread (most recent call first):\n  File "/tests/test_a.py", line 29 in test_a\n\n'
        'Thread (most recent call first):\n  File "/lib/autograd.py", line 9 in engine'
    )
    assert read_stacks("") == ("", "")
