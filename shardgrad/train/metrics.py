"""What a run measures, written down: one JSON object a line, and on request the same curves for TensorBoard."""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shardgrad.errors import install
from shardgrad.files import refuse_link, replace_text
from shardgrad.train.config import ConfigError


class Metrics:
    """A JSONL file; each line has a `kind` and a `step`, and has left this process when `write` returns.

    path: None writes nothing (every rank but the first).
    begun: steps of the checkpoint that the run goes on from: lines of later steps, which will be written again, are cut
        off, and so is one that a killed process did not finish.
    board: a folder for TensorBoard's files, or None.

    Raises:
        OSError: the file cannot be written; names it.
    """

    def __init__(self, path: Path | None, begun: int = 0, board: Path | None = None) -> None:
        self._path = path
        for one in (path, board):
            if one is not None and path is not None:
                refuse_link(one)
        if path is not None and path.is_file():
            replace_text(path, "".join(json.dumps(line) + "\n" for line in read(path) if _is_before(line, begun)))
        self._file = _appended(path) if path is not None else None
        self._board = _writer(board, begun) if board is not None and path is not None else None

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes."""
        return self._file is not None

    def write(self, kind: str, **values: Any) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            except OSError as error:
                raise OSError(f"cannot write {self._path}: {error.strerror}") from None
        if self._board is not None and kind in ("train", "held_out"):
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(f"{kind}/{name}", value, values["step"])

    def to_disk(self) -> None:
        """Return when all lines would outlive a loss of power: a checkpoint counts on those before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics, without one that is not finished.

    Raises:
        OSError: a line is damaged; names it.
    """
    found = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text or "null")
            if line is not None:
                found.append({**line, "kind": line["kind"], "step": int(line["step"])})
        except (ValueError, LookupError, TypeError):
            raise OSError(f"{path}, line {number} is not what a run writes: delete the line") from None
    return found


def check_board() -> None:
    """Raises ConfigError if TensorBoard's files cannot be written here."""
    _summary_writer()


def _appended(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "a")


def _is_before(line: dict[str, Any], begun: int) -> bool:
    return bool(line["step"] <= begun) and line["kind"] != "end"


def _writer(board: Path, begun: int) -> Any:
    """`purge_step` hides what an earlier process wrote of the steps that come again."""
    return _summary_writer()(log_dir=str(board), purge_step=begun + 1 if begun else None)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"run.tensorboard = true, but {error}; it is installed {install('tensorboard')}") from None
    return SummaryWriter
