"""The digests of a checkpoint's files, written last: what was altered, cut short, exchanged or lost since is named."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from shardgrad.arguments import told

FORMAT = 2
MODEL, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"
FILES = (MODEL, OPTIMIZER, STATE, SUMS)
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


class DamagedError(ValueError):
    """A checkpoint that does not hold what was saved; names the file, and says what is wrong with it."""


@dataclass(frozen=True)
class Verified:
    """A checkpoint whose files are those that were saved.

    seal: the digest of their digests. state: what `state.json` holds.
    """

    seal: str
    state: dict[str, Any]


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` beside the files of a checkpoint, which are complete."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in FILES if name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify(path: str | Path, seal: str | None = None) -> Verified:
    """Compare every file of a checkpoint with its digest.

    seal: as this returned it on a rank that has done so. The large files are not read again then: that they are the
        same ones is known from their digests.

    Raises:
        FileNotFoundError: there is no such folder.
        DamagedError: a file is missing, cannot be read, or is not the one that was saved.
        ValueError: the checkpoint is of another format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no checkpoint: there is no such folder")
    sums, found = _sums(folder)
    state = _read(folder / STATE)
    if seal is not None and found != seal:
        raise DamagedError(
            f"{folder / SUMS} is not the one that the first rank has read: do all machines see one file?"
        )
    for name, wanted in sums.items():
        if name == STATE:
            have = hashlib.sha256(state).hexdigest()
        elif seal is not None:
            continue
        else:
            have = _sha256(folder / name)
        if have != wanted:
            raise DamagedError(
                f"{folder / name} is not the file that was saved: its SHA-256 is {have[:12]}…, and {SUMS} has "
                f"{wanted[:12]}…"
            )
    return Verified(found, _state(folder / STATE, state))


@told
def digest(path: str | Path) -> str:
    """A name for the bits of a checkpoint's tensors, which do not depend on the mesh that saved them.

    Raises:
        DamagedError: its digests cannot be read.
    """
    sums, _ = _sums(Path(path))
    return hashlib.sha256(b"".join(bytes.fromhex(sums[name]) for name in (MODEL, OPTIMIZER))).hexdigest()[:16]


def _sums(folder: Path) -> tuple[dict[str, str], str]:
    """The files' digests, and the digest of the file that holds them."""
    if not (folder / SUMS).exists():
        _refuse_format_1(folder)
    raw = _read(folder / SUMS)
    lines = raw.decode(errors="replace").split("\n")
    matched = [_LINE.fullmatch(line) for line in lines[:-1]]
    sums = {one[2]: one[1] for one in matched if one is not None}
    if lines[-1] or None in matched or sorted(sums) != sorted(set(FILES) - {SUMS}):
        raise DamagedError(f"{folder / SUMS} is not the file that was saved: it must have one line for each other file")
    return sums, hashlib.sha256(raw).hexdigest()


def _refuse_format_1(folder: Path) -> None:
    """A checkpoint without digests is an old one, if it says so itself."""
    try:
        state = json.loads(_read(folder / STATE))
    except (DamagedError, ValueError, RecursionError):
        return
    if isinstance(state, dict) and state.get("format") == 1:
        _refuse_format(folder, 1)


def _refuse_format(folder: Path, found: object) -> NoReturn:
    raise ValueError(
        f"{folder} has format {found!r}, and this version of shardgrad reads {FORMAT}, whose files have digests: load "
        "it with the version that saved it"
    )


def _state(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        state = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no JSON: {error}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise DamagedError(f"{path} has no format: it is not what a checkpoint holds")
    if state["format"] != FORMAT:
        _refuse_format(path.parent, state["format"])
    if not _is_optimizer(state.get("optimizer", 0)):
        raise DamagedError(f"{path}: optimizer is neither null nor its kind, the names of parameters, and numbers")
    return state


def _is_optimizer(about: Any) -> bool:
    """Whether it is what `saving` writes of an optimizer."""
    if about is None:
        return True
    try:
        kind, parameters, numbers = about["kind"], about["parameters"], about["numbers"]
        return (
            len(about) == 3
            and isinstance(kind, str)
            and isinstance(parameters, list)
            and all(isinstance(name, str) for name in parameters)
            and {entry.rpartition("/")[0] for entry in numbers} <= set(parameters)
            and all(isinstance(number, int | float) for number in numbers.values())
        )
    except (LookupError, TypeError, AttributeError):
        return False


def _read(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


def _sha256(path: Path) -> str:
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")  # a pipe would be waited for
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from None
