"""Results on disk: one JSON object a line, written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from shardgrad.settings import ConfigError, check_regular

FILE = "results.jsonl"
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The lines of a results file, or of the one in a folder; one that was cut short is left out.

    Raises:
        ConfigError: there is none, or it holds something else.
    """
    path = path / FILE if path.is_dir() else path
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read results from {path}: {reason}") from None
    lines = []
    *whole, _ = text.split("\n")  # what follows the last line's end was being written when its writer ended
    for number, one in enumerate(whole, 1):
        try:
            line = json.loads(one)
            line["key"], line["status"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path}, line {number}, is no result of shardgrad scale: delete it, or give another run.dir"
            ) from None
        lines.append(line)
    return lines


@contextmanager
def opened(folder: Path) -> Iterator[Results]:
    """The results in a folder, for one process at a time.

    Raises:
        ConfigError: another process has them, or they cannot be read or written.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_regular(path)
        file = path.open("a+b")
    except OSError as error:
        raise ConfigError(f"cannot write results to {path}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is writing to {path}: wait for it, or give run.dir=…") from None
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        yield Results(file, read(path))


class Results:
    def __init__(self, file: Any, lines: list[Line]) -> None:
        self._file, self.lines = file, lines

    def add(self, line: Line) -> None:
        """Append a line, and see it on the disk."""
        self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(line)

    def latest(self, key: str, measuring: Mapping[str, Any]) -> Line | None:
        """The last result of a cell that was measured so."""
        found = [line for line in self.lines if line["key"] == key and line.get("measuring") == dict(measuring)]
        return found[-1] if found else None


def summed(ranks: list[Line]) -> Line:
    """One cell's figures from what its ranks measured.

    A step is as long as on its slowest rank. Of its communication the mean over ranks counts: what the slowest rank
    computes, the others wait.
    """
    steps = [max(times) for times in zip(*(rank["seconds"] for rank in ranks))]
    middle = median(steps)
    communicating = None
    if all(rank["communicating"] is not None for rank in ranks):
        communicating = median(sum(times) / len(ranks) for times in zip(*(rank["communicating"] for rank in ranks)))
    predicted = [sum(rank["predicted"].values()) for rank in ranks]
    traced = [sum(rank["traced"].values()) for rank in ranks]
    most = ranks[max(range(len(ranks)), key=traced.__getitem__)]
    memory = [rank["memory"] for rank in ranks if rank["memory"] is not None]
    return {
        "seconds": middle,
        "quartiles": _quartiles(steps),
        "steps": steps,
        "communicating": communicating,
        "tokens_per_second": ranks[0]["tokens"] / middle,
        "flops": ranks[0]["flops"],
        "bytes_predicted": predicted,
        "bytes_traced": traced,
        "as_predicted": all(rank["predicted"] == rank["traced"] for rank in ranks),
        "traced_of_most": most["traced"],
        "predicted_of_most": most["predicted"],
        "peak_memory": max(memory) if memory else None,
    }


def _quartiles(values: list[float]) -> list[float]:
    """The first and the third, interpolated between values."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return [at(0.25), at(0.75)]
