"""Hostile configurations: each ends as one that can be used, or in one clear error, soon and in little memory."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shardgrad import settings
from shardgrad.chaos.tally import Row, Tally
from shardgrad.errors import shorten
from shardgrad.scale import config as experiments
from shardgrad.scale.cell import Cell
from shardgrad.settings import ConfigError
from shardgrad.train import config as training
from shardgrad.train import corpus
from shardgrad.train.data import DataError
from shardgrad.train.memory import check_memory

MOST_SECONDS, MOST_MEMORY, MOST_ECHO = 5.0, 200 * 2**20, 500
_COMMANDS = 100  # of so many inputs one goes through the command as well

_TRAINING = """
run: {dir: runs/x}
data: {files: []}
model: {layers: 1, heads: 2, d_model: 12, seq_len: 5}
train: {steps: 10, batch: 2, lr: 3e-3}
"""
_EXPERIMENT = """
title: small
run: {repeats: 2}
matrix: {layout: [column, row_sequence], sizes: {n: 30, d: 11, m: 7}, ranks: [1, 2]}
cells: [{}, {dtype: bfloat16}]
"""
_SCALARS = (
    *("0", "-1", "1", "true", "null", "~", "''", ".inf", "-.inf", ".nan", "1e300", "1e-300", "1e400", "-1e300", "0x1F"),
    *("1_0", "1:30", "1000000000000", "9223372036854775807", "-9223372036854775808", "9" * 300, "9" * 5000, "=", "<<"),
    *("2026-13-45", "2026-11-27 99:99:99", "!!int 'x'", "!!int ''", "!!float 'x'", "!!bool 'x'", "!!null 'x'", "!x y"),
    *("!!timestamp 'x'", "!!set 5", "!!set {a, b}", "!!binary x", "!!omap [a: 1]", "!!pairs 3", "!!str 5", "!!seq x"),
    *("!!python/object:os.system x", "[]", "{}", "[[[]]]", "{a: {b: c}}", "{1: 2}", "[1, 2", "{a", "'"),
    *('"\\0"', '"\\uD800"', '"\\UFFFFFFFF"', '"\\x1b[31m"', "é\u202e\U0001f600", "\ufeff", "\x07", "\udcff", "a\0b"),
    *("x" * 400, "x" * 10**5, "{[a]: b}", "- x", "[" * 3000, "{a: " * 2000, "&a [*a]", "&a {b: *a}", "*a", "/dev/zero"),
)  # fmt: skip


def run(seed: int, count: int) -> list[Row]:
    """Try `count` configurations, alike for one seed: of each kind a row.

    One holds if it is read, or refused by a `ConfigError` or `DataError`, within 5 s of processor time and 200 MB, with
    at most 500 characters of the input in a message; what is read must be written and read again to the same.
    """
    rng = random.Random(seed)
    tally = Tally((*_KINDS, "commands"))
    with tempfile.TemporaryDirectory(prefix="shardgrad-chaos-") as folder:
        for at in range(count):
            kind = list(_KINDS)[at % len(_KINDS)]
            path, overrides, load = _KINDS[kind](rng, Path(folder))
            given = shorten(f"{path.name} {overrides}")
            failure = _failure(path, overrides, load)
            tally.note(kind, failure and f"{given}: {failure}")
            if at % _COMMANDS == _COMMANDS - 1:
                read, name = (experiments.load, "scale") if load is experiments.load else (training.load, "trace")
                command = [sys.executable, "-m", "shardgrad", name, str(path), *overrides]
                if all("\0" not in one and len(one) < 10**5 for one in command) and _refuses(read, path, overrides):
                    failure = _failure_of_command(command)
                    tally.note("commands", failure and f"{given}: {failure}")
    return tally.rows


def _failure(path: Path, overrides: list[str], load: Callable[[Path, list[str]], object]) -> str | None:
    """What is wrong with how an input ended."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = ""
    try:
        load(path, overrides)
    except (ConfigError, DataError) as error:
        told = str(error)
    except Exception as error:
        return f"{type(error).__name__}: {shorten(str(error))}"
    took = time.process_time() - began
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if took > MOST_SECONDS or grown > MOST_MEMORY:
        return f"took {took:.1f} s and {grown / 2**20:.0f} MB"
    given = [*overrides, path.name, *([_text(path)] if path.name == "some.yaml" else [])]
    if any(one[at : at + MOST_ECHO + 1] in told for one in given for at in range(0, len(one) - MOST_ECHO, 250)):
        return f"repeats more than {MOST_ECHO} characters of the input"
    return None


def _refuses(read: Callable[[Path, list[str]], object], path: Path, overrides: list[str]) -> bool:
    try:
        read(path, overrides)
    except ConfigError:
        return True
    return False


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _failure_of_command(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    if done.returncode != 2 or "Traceback" in done.stderr:
        return f"status {done.returncode}: {shorten(done.stderr)}"
    return None


def _load_training(path: Path, overrides: list[str]) -> object:
    """All that the training program reads before it meets other ranks."""
    config = training.load(path, overrides)
    again = path.with_name("again.yaml")
    again.write_text(config.to_yaml(), encoding="utf-8")
    if training.load(again) != config:
        raise AssertionError("is not the same when written and read again")
    config = training.check_ranks(config, 2)
    check_memory(config.model_copy(update={"mesh": config.mesh.model_copy(update={"device": "cpu"})}), 2, 2)
    return corpus.open_corpus(config.data, config.model.seq_len) if not corpus.is_encoded(config.data) else None


_Input = tuple[Path, list[str], Callable[[Path, list[str]], object]]


def _which(rng: random.Random) -> tuple[str, type[settings.Section], Callable[[Path, list[str]], object]]:
    if rng.random() < 0.6:
        return _TRAINING, training.Config, _load_training
    return _EXPERIMENT, experiments.Config, experiments.load


def _values(rng: random.Random, folder: Path) -> _Input:
    """One to three keys with values that they do not expect, on the command line."""
    text, model, load = _which(rng)
    keys = [key for key, _ in settings.keys(model)]
    if model is experiments.Config:
        keys += [f"matrix.{key}" for key in Cell.model_fields] + ["matrix.sizes.n", "matrix.mesh.tp"]
    keys += [key.partition(".")[0] for key in keys] + ["a", "a.b", "." * 50, "k" * 5000, "\udcff", ""]
    overrides = [f"{rng.choice(keys)}={rng.choice(_SCALARS)}" for _ in range(rng.randint(1, 3))]
    return _written(folder, text), overrides, load


def _texts(rng: random.Random, folder: Path) -> _Input:
    """A file some of whose bytes are others, or are gone, or come again; or that is something else altogether."""
    text, _, load = _which(rng)
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(raw) + 1), rng.randint(0, 20)
        junk = rng.choice([rng.randbytes(length), rng.choice(_SCALARS).encode(errors="replace"), bytes(raw[:length])])
        raw[at : at + rng.randint(0, length)] = junk
    if rng.random() < 0.3:
        raw = bytearray(rng.choice(list(_whole_texts(rng))).encode(errors="replace"))
    return _written(folder, bytes(raw)), [], load


def _whole_texts(rng: random.Random) -> Iterator[str]:
    size = rng.choice([5, 50, 3000])
    yield from ("", "\ufeff", "[1]", "- a", "\t- a", "--- 1\n--- 2\n", "%YAML 9.9\n--- a", "\n" * size, "'" * size)
    yield "".join(f"k{at}: {at}\n" for at in range(size))
    yield "".join(f"a{at}: &b{at} [{','.join([f'*b{at - 1}'] * 9 if at else 'xxxxx')}]\n" for at in range(10))
    yield "a: &a {b: 1}\n" + "".join(f"c{at}: {{<<: *a}}\n" for at in range(size))
    yield from (opening * size for opening in ("[", "{a: ", "- ", "? ", "!", "&", "*", "a: ", "|\n ", "#", '"\\'))


def _files(rng: random.Random, folder: Path) -> _Input:
    """What is no regular file, as configuration or as data."""
    fifo, link = folder / "fifo", folder / "link"
    if not fifo.exists():
        os.mkfifo(fifo)
        link.symlink_to("/dev/zero")
    strange = rng.choice([fifo, link, folder, folder / "no", folder / ("n" * 300), Path("a\0b"), Path("/dev/zero")])
    text, model, load = _which(rng)
    if model is experiments.Config:
        cells = f"cells=[{{kind: step, layout: null, sizes: {{}}, train: '{strange}'}}]"
        return (strange, [], load) if rng.random() < 0.5 else (_written(folder, text), [cells], load)
    key = rng.choice(["", "data.files=[{}]", "data.tokens={}", "data.tokens={}"])
    more = ["data.vocab=300"] if "tokens" in key else []
    return _written(folder, text) if key else strange, [key.format(strange), *more] if key else [], load


def _matrices(rng: random.Random, folder: Path) -> _Input:
    """Experiments with too many cells, or with cells that no machine has."""
    values: dict[str, Any] = {
        "layout": ["column", "row", "2d", "X[n,d/tp] W[d/tp,m] -> Y[n,m]"],
        "dtype": ["float32", "bfloat16"],
        "threads": list(range(1, rng.choice([2, 40]))),
        "ranks": [rng.choice([1, 2, 10**3, 10**6, 2**40, 0, -1]) for _ in range(rng.choice([1, 3, 40]))],
        "grow": [{"n": rng.choice([0, 1, -8, 8, 1e300])}, {}],
        "sizes": [{"n": rng.choice([1, 10**6, 10**12, 2**70, 0]), "d": 3, "m": rng.choice([5, 2**40])}],
    }
    chosen = rng.sample(list(values), rng.randint(1, len(values)))
    overrides = [f"matrix.{key}={values[key]}" for key in chosen]
    return _written(folder, _EXPERIMENT), overrides, experiments.load


def _written(folder: Path, text: str | bytes) -> Path:
    path = folder / "some.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


_KINDS: dict[str, Callable[[random.Random, Path], _Input]] = {
    "values": _values,
    "texts": _texts,
    "files": _files,
    "matrices": _matrices,
}
