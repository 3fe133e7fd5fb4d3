"""The beginning and the end of a long text, and where all of it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

MOST = 40_000
"""Characters of one traceback, or of what one rank printed, that a report repeats."""


def excerpt(text: str, most: int = MOST) -> str:
    """The text; of one longer than `most`, its two ends around a line that names a file with the whole.

    The file is in the directory of temporary files, and stays there.
    """
    if len(text) <= most:
        return text
    path = _new_file()
    path.write_text(text, encoding="utf-8", errors="replace")
    return _joined(text[: most // 2], text[-most // 2 :], f"{len(text):,} characters", path)


def excerpt_of_file(path: Path, most: int = MOST) -> str:
    """As `excerpt`, of a file, which is copied and never read whole."""
    size = path.stat().st_size
    if size <= most:
        return path.read_text(errors="replace")
    kept = _new_file()
    shutil.copyfile(path, kept)
    with kept.open("rb") as file:
        first = file.read(most // 2)
        file.seek(-(most // 2), os.SEEK_END)
        last = file.read()
    return _joined(first.decode(errors="replace"), last.decode(errors="replace"), f"{size:,} bytes", kept)


def _new_file() -> Path:
    handle, name = tempfile.mkstemp(prefix="shardgrad-whole-", suffix=".txt")
    os.close(handle)
    return Path(name)


def _joined(first: str, last: str, size: str, path: Path) -> str:
    return f"{first}\n[… left out: all {size} are in {path}]\n{last}"
