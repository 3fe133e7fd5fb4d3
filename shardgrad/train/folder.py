"""The folder that a run leaves its results in: always a new one."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from shardgrad.train.config import ConfigError

METRICS, PICTURE, CONFIG, CHECKPOINT, SAMPLE = "metrics.jsonl", "loss.png", "config.yaml", "checkpoint", "sample.txt"


def create(wanted: str) -> Path:
    """Make `wanted`, or the first of `wanted-2`, `wanted-3`, … that does not exist.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    for number in count(1):
        folder = Path(wanted if number == 1 else f"{wanted}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"run.dir: cannot make the folder {folder}: {error.strerror}") from None
        return folder
    raise AssertionError("count ends")
