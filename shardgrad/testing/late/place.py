"""Where in a program something was done: the lines that a report names."""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import typing_extensions

_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_MACHINERY = (
    str(Path(torch.__file__).parent) + os.sep,
    str(Path(__file__).parents[1]) + os.sep,
    typing_extensions.__file__,  # torch's deprecated functions, such as all_gather_into_tensor, are wrapped in it
    "<frozen",
    "<string>",
)
_MOST = 6


@dataclass(frozen=True, slots=True)
class Place:
    """Frames (file, line, function), the innermost first; not those of torch, Python's library and this package."""

    frames: tuple[tuple[str, int, str], ...]

    def __str__(self) -> str:
        """The first line with its code, the others by their numbers."""
        if not self.frames:
            return "a thread without Python code of the program"
        file, line, function = self.frames[0]
        code = linecache.getline(file, line).strip()
        first = f"{_shown(file)}:{line} in {function}" + (f": {code}" if code else "")
        others = [f"{_shown(file)}:{line}" for file, line, _ in self.frames[1:]]
        return first + (f" (called from {', '.join(others)})" if others else "")

    @property
    def line(self) -> str:
        """`file:line` of the innermost frame."""
        return f"{_shown(self.frames[0][0])}:{self.frames[0][1]}" if self.frames else "?"


def here() -> Place:
    """The place that this thread is at."""
    frames: list[tuple[str, int, str]] = []
    frame = sys._getframe(1)
    while frame is not None and len(frames) < _MOST:
        code = frame.f_code
        if _is_of_program(code.co_filename):
            frames.append((code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return Place(tuple(frames))


@functools.cache
def _is_of_program(file: str) -> bool:
    if file.startswith(_MACHINERY):
        return False
    return not file.startswith(_STDLIB) or "site-packages" in file


def _shown(file: str) -> str:
    """Relative to the working directory, where the file is below it."""
    beneath = os.getcwd() + os.sep
    return file.removeprefix(beneath)
