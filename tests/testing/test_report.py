"""What a report repeats of very much text, and of values whose repr is slow, huge or broken."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from shardgrad.testing import excerpt, failure
from shardgrad.testing.messages import Reply
from shardgrad.testing.report import judge


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excerpt.tempfile, "tempdir", str(tmp_path))


class Slow:
    def __repr__(self) -> str:
        try:
            time.sleep(60)
        except Exception:  # as a careless repr does
            return ""
        return "slow"


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("never mind")


def test_a_long_text_is_told_by_its_ends_and_lies_whole_in_a_file() -> None:
    whole = "begin " + "x" * 10**6 + " end"
    verdict, text = judge([Reply("failed", "y" * 10**6, whole, "z" * 10**6), Reply("passed")], 5)
    assert verdict == "failed"
    assert len(text) < 3 * excerpt.MOST
    assert "begin xxx" in text
    assert "xxx end" in text
    paths = re.findall(r"left out: all 1,000,0\d\d characters are in (\S+)\]", text)
    assert len(paths) == 2
    assert Path(paths[0]).read_text() == whole


def test_a_large_output_is_copied_and_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"first " + b"x" * 10**6 + b" last")
    text = excerpt.excerpt_of_file(path)
    assert len(text) < excerpt.MOST + 200
    assert text.startswith("first x")
    assert text.endswith("x last")
    kept = re.search(r"all 1,000,011 bytes are in (\S+)\]", text)
    assert kept is not None
    assert Path(kept[1]).read_bytes() == path.read_bytes()
    path.write_text("little")
    assert excerpt.excerpt_of_file(path) == "little"


def test_values_whose_repr_is_slow_huge_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "_REPR_SECONDS", 0.05)
    slow, broken, raw = Slow(), Broken(), b"x" * 10**7
    many = {f"v{at}": at for at in range(100)}
    began = time.monotonic()
    try:
        exec("raise ValueError", {}, {"slow": slow, "broken": broken, "raw": raw, **many})
    except ValueError as error:
        _, _, variables = failure.describe(error)
    assert time.monotonic() - began < 5
    assert "slow = <Slow, whose repr took more than 0.05 s>" in variables
    assert "broken = <Broken" in variables
    assert "raw = b'xxx" in variables
    assert "and 63 more" in variables
    assert len(variables) < 5000


def test_an_exception_whose_text_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    class LateError(Exception):
        __str__ = Slow.__repr__

    monkeypatch.setattr(failure, "_TEXT_SECONDS", 0.05)
    began = time.monotonic()
    try:
        raise LateError
    except LateError as error:
        summary, text, _ = failure.describe(error)
    assert "LateError" in summary
    assert time.monotonic() - began < 5
    assert "test_report.py" in text
