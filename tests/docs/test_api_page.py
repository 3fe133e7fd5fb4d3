"""docs/api.md has every public name once, with its real signature. Run as a script, this file writes them anew."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from pathlib import Path

import shardgrad as sg

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
ENTRY = re.compile(r"^- `(?P<name>\w+)(?P<rest>[^`]*)`", re.MULTILINE)


def signature(name: str) -> str:
    """The name as it is called, without annotations; of what is not called, the name alone."""
    thing = getattr(sg, name)
    if not callable(thing) or (inspect.isclass(thing) and issubclass(thing, Exception)):
        return name
    found = inspect.signature(thing)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return f"{name}{text}".replace("'", '"')


def rewritten(text: str) -> str:
    return ENTRY.sub(lambda entry: f"- `{signature(entry['name'])}`", text)


def test_every_public_name_stands_once() -> None:
    counts = Counter(entry["name"] for entry in ENTRY.finditer(PAGE.read_text()))
    assert counts == Counter(sg.__all__)


def test_signatures_are_the_real_ones() -> None:
    written = {entry["name"]: entry[0] for entry in ENTRY.finditer(PAGE.read_text())}
    assert written == {name: f"- `{signature(name)}`" for name in written}


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
