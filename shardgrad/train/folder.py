"""The folder that a run leaves its results in, and finds again: after a restart by torchrun, or to go on."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

from shardgrad.files import refuse_link, replace_text
from shardgrad.train.config import ConfigError

METRICS, CONFIG, RUN, SAMPLE, PAGE = "metrics.jsonl", "config.yaml", "run.json", "sample.txt", "report.html"
CHECKPOINTS, TENSORBOARD, MODEL = "checkpoints", "tensorboard", "model"
_STEP = re.compile(r"step-(\d+)")


def job(environment: Mapping[str, str] = os.environ) -> str:
    """Names what torchrun restarts: its rendezvous id, or where that is nothing of its own, its process."""
    name = environment.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name


def restarts() -> int:
    """How many times torchrun has started this job's processes before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def find(wanted: str, resume: str | None) -> Path | None:
    """The folder of a run that goes on; None if a new one begins.

    Raises:
        ConfigError: with resume = "auto", what lies at `wanted` is no run.
    """
    if resume == "auto":
        folder = Path(wanted)
        if (folder / RUN).exists():
            return folder
        begun = f".{RUN}.partial"  # all that a process left which was killed at once
        if folder.exists() and (not folder.is_dir() or any(one.name != begun for one in folder.iterdir())):
            raise ConfigError(f"run.resume = auto: {folder} is not the folder of a run: it has no {RUN}")
        return None
    if restarts():
        mine = [folder for folder in _numbered(wanted) if _job_of(folder) == job()]
        return mine[-1] if mine else None
    return None


def create(wanted: str, *, exactly: bool = False) -> Path:
    """Make `wanted`, or the first of `wanted-2`, `wanted-3`, … that does not exist; `exactly`: only `wanted`.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    for number in count(1):
        folder = _name(wanted, number)
        try:
            folder.mkdir(parents=True, exist_ok=exactly)
            adopt(folder)
        except FileExistsError:
            if exactly or not folder.is_dir():
                raise ConfigError(f"run.dir: {folder} is no folder") from None
            continue
        except OSError as error:
            raise ConfigError(f"run.dir: cannot make the folder {folder}: {error.strerror}") from None
        return folder
    raise AssertionError("count ends")


def adopt(folder: Path) -> None:
    """Write down that this job goes on in the folder: its restarts find it."""
    replace_text(folder / RUN, json.dumps({"job": job()}) + "\n")


def lock(folder: Path) -> int:
    """Keep other processes from writing to the folder while this one lives; returns the handle that holds the lock.

    Raises:
        ConfigError: another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(
            f"run.dir: another process is training in {folder}: wait for its end, or choose another run.dir"
        ) from None
    except OSError:  # a file system without locks
        pass
    return handle


def checkpoint(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies. Digits are padded so that names sort as steps do."""
    return folder / CHECKPOINTS / f"step-{step:08}"


def step_of(path: Path) -> int | None:
    """The step that the name of a checkpoint's folder says, if it is such a name."""
    matched = _STEP.fullmatch(path.name)
    return int(matched[1]) if matched else None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the whole checkpoints, oldest first. One is renamed to its name when it is whole."""
    found = []
    for path in (folder / CHECKPOINTS).glob("step-*"):
        step = step_of(path)
        if step is not None:
            found.append((step, path))
    return sorted(found)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again; its files stay as they are."""
    for number in count(1):
        aside = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(aside):
            os.rename(path, aside)
            return aside
    raise AssertionError("count ends")


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Look for symbolic links in a run's folder where the run would write.

    Raises:
        ConfigError: there is one.
    """
    for name in names:
        try:
            refuse_link(folder / name)
        except OSError as error:
            raise ConfigError(f"run.dir: {error}") from None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints; a name goes before its files, so that a name means a whole one."""
    for _, path in checkpoints(folder)[:-keep]:
        doomed = path.with_name(f".{path.name}.old")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what a killed process left of checkpoints it was writing or deleting."""
    for pattern in (".*.partial", ".*.old"):
        for path in (folder / CHECKPOINTS).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _name(wanted: str, number: int) -> Path:
    return Path(wanted if number == 1 else f"{wanted}-{number}")


def _numbered(wanted: str) -> list[Path]:
    """The folders that `create` has made, in order."""
    found: list[Path] = []
    for number in count(1):
        folder = _name(wanted, number)
        if not folder.exists():
            return found
        found.append(folder)
    raise AssertionError("count ends")


def _job_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / RUN).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
