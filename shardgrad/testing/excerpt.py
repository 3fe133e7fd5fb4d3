"""The beginning and the end of a long text, and where all of it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

MOST = 40_000
"""Characters of one traceback, or of what one rank printed, that a report repeats."""


def excerpt(text: str) -> str:
    """The text; of one longer than `MOST`, its two ends around a line that names a file with the whole.

    The file is in the directory of temporary files, and stays there.
    """
    if len(text) <= MOST:
        return text
    path = _new_file()
    path.write_text(text, encoding="utf-8", errors="replace")
    return _joined(text[: MOST // 2], text[-MOST // 2 :], f"{len(text):,} characters", path)


def excerpt_of_file(path: Path) -> str:
    """As `excerpt`, of a file, which is copied and never read whole."""
    size = path.stat().st_size
    if size <= MOST:
        return path.read_text(errors="replace")
    kept = _new_file()
    shutil.copyfile(path, kept)
    with kept.open("rb") as file:
        first = file.read(MOST // 2)
        file.seek(-(MOST // 2), os.SEEK_END)
        last = file.read()
    return _joined(first.decode(errors="replace"), last.decode(errors="replace"), f"{size:,} bytes", kept)


def _new_file() -> Path:
    handle, name = tempfile.mkstemp(prefix="shardgrad-whole-", suffix=".txt")
    os.close(handle)
    return Path(name)


def _joined(first: str, last: str, size: str, path: Path) -> str:
    return f"{first}\n[… left out: all {size} are in {path}]\n{last}"
