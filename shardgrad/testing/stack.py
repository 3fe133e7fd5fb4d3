"""Reads what faulthandler wrote about a rank: where the test stands, without the pool around it."""

from __future__ import annotations

import re
from pathlib import Path

_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)')
_THREAD = re.compile(r"hread 0x[0-9a-f]+.*? \(")
_MACHINERY = (str(Path(__file__).with_name("worker.py")), "<string>")


def read_stacks(text: str) -> tuple[str, str]:
    """Returns the innermost place of the thread that runs the test, and all stacks, that thread's first.

    Thread numbers are left out: ranks that wait in the same place then read the same.
    """
    blocks = []
    for block in text.strip().split("\n\n"):
        lines = [_THREAD.sub("hread (", line) for line in block.splitlines()]
        if block.startswith("Extension modules") or any(_is_ours(line, "listen") for line in lines):
            continue
        size = len(lines)
        while len(lines) > 2 and _is_ours(lines[-1]):  # the outermost frames come last
            lines.pop()
        blocks.append((len(lines) == size, lines))
    blocks.sort(key=lambda block: block[0])  # where nothing of the pool was found, it is another thread
    frames = filter(None, map(_FRAME.fullmatch, blocks[0][1] if blocks else ()))
    innermost = next(frames, None)
    place = ""
    if innermost:
        place = f"{innermost['function']} ({Path(innermost['file']).name}:{innermost['line']})"
    return place, "\n\n".join("\n".join(lines) for _, lines in blocks)


def _is_ours(line: str, function: str | None = None) -> bool:
    frame = _FRAME.fullmatch(line)
    return frame is not None and frame["file"] in _MACHINERY and function in (None, frame["function"])
