"""What is told to install something holds: shardgrad is on no index, so that its name alone installs nothing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from shardgrad.cli import entry
from shardgrad.errors import install

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TEXTS = [
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "launch/*.py", "shardgrad/**/*.py")
    for path in ROOT.glob(pattern)
]


def test_nothing_says_that_an_index_has_it() -> None:
    for path in TEXTS:
        text = path.read_text()
        assert not re.search(r"pip install [^\n]{0,30}['\"` ]shardgrad\b", text), path
        for extra in (*re.findall(r"-e '\.\[(\w+)\]'", text), *re.findall(r"\binstall\('(\w+)'\)", text)):
            assert extra in EXTRAS, path


def test_a_library_that_is_missing_is_told_with_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> object:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr("builtins.__import__", missing)
    with pytest.raises(SystemExit, match=re.escape("pip install -e '.[cli]'")):
        entry.main()
    monkeypatch.undo()
    assert install("hf").endswith("pip install -e '.[hf]'")
