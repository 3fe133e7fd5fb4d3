"""No host waits for its device in a warm step whose sizes are told, but MoE's, once: shown without a GPU.

On one, `tests/gpu/test_gpu_streams.py` has torch itself refuse to wait.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import forked
import pytest

pytestmark = pytest.mark.slow  # some 12 s for one process
PROGRAM = Path(__file__).with_name("no_host_sync_program.py")
ONCE = "waits 1 times in forward, 0 in backward"


@cache
def said(about: str) -> dict[str, str]:
    """What the program says of each call."""
    status, printed = forked.run(PROGRAM, 1, 200, [about])
    assert status == 0, printed
    lines = [line for line in printed.splitlines() if ": " in line]
    return {name: text for name, _, text in (line.partition(": ") for line in lines)}


def goes_on(about: str) -> dict[str, bool]:
    """Whether the host does in each call, or waits as often as it may."""
    found = {name: text for name, text in said(about).items() if not name.startswith("planted ")}
    assert {name: text for name, text in found.items() if text != "goes on" and not name.startswith("MoE")} == {}
    return {name: text in ("goes on", ONCE) for name, text in found.items()}


def test_the_host_goes_on() -> None:
    found = goes_on("layers")
    assert len(found) > 35
    assert all(found.values())
    assert [name for name, text in said("layers").items() if text == ONCE] == ["MoE", "MoE, not gated"]


@pytest.mark.slow
@pytest.mark.rare
def test_in_models_of_the_training_program_too() -> None:
    assert goes_on("models") == {"GPT": True, "GPT, fully sharded": True, "Llama": True}


def test_where_it_would_wait_is_seen() -> None:
    found = {name: text for name, text in said("layers").items() if name.startswith("planted ")}
    assert len(found) == 11
    assert all(text.startswith("waits: ") for text in found.values()), found
    assert "no_host_sync_program.py" in found["planted from the host"]
