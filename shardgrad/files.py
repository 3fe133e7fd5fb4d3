"""Files and folders written so that each is the old one or the new one at every moment, and no symbolic link is
followed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PICTURES = (".svg", ".png", ".pdf")  # endings of the pictures that can be written


def to_disk(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_link(path: Path) -> None:
    """Raises FileExistsError if something is to be written to a path that is a symbolic link."""
    if path.is_symlink():
        raise FileExistsError(
            f"{path} is a symbolic link to {os.readlink(path)}, which is not followed: nothing is written there. "
            "Remove the link, or name what it leads to"
        )


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends: of a link, not of what it leads to.

    After an error `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # what a killed process left
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text, in UTF-8, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


class NewFolder:
    """A folder that is filled under another name, and gets its own when all of it is on the disk.

    Attributes:
        partial: where its files are written between `begin` and `finish`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begun = False
        self.partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"

    def begin(self) -> None:
        """Make it under its other name, with its parents.

        Raises:
            OSError: it cannot be made, or there is one of its name that is a link or not empty.
        """
        refuse_link(self._folder)
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise FileExistsError("it exists already. Name a folder that does not, or empty it")
        self.partial.mkdir(parents=True)
        self._begun = True

    def finish(self) -> None:
        """Bring everything to the disk, and give the folder its name."""
        for path in (*self.partial.iterdir(), self.partial):
            to_disk(path)
        os.rename(self.partial, self._folder)  # replaces an empty folder, and nothing else
        self._begun = False
        to_disk(self._folder.parent)

    def discard(self) -> None:
        """Remove what has not got its name."""
        if self._begun:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._begun = False
