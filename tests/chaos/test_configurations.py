"""Hostile configurations: none ends in a traceback, in much time or memory, or in pages of its own text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from refused import refusal

from shardgrad.chaos.configurations import run
from shardgrad.scale import config as experiments
from shardgrad.train import config as training
from shardgrad.train.config import ConfigError, check_ranks
from shardgrad.train.data import DataError, read
from shardgrad.train.memory import check_memory
from shardgrad.train.tokens import open_tokens

TRAINING = "model: {layers: 1, heads: 2, d_model: 12, seq_len: 5}\ntrain: {steps: 10, batch: 2, lr: 3e-3}\n"
EXPERIMENT = "title: small\nmatrix: {layout: column, sizes: {n: 30, d: 11, m: 7}, ranks: 1}\n"
BOMB = "".join(f"a{at}: &b{at} [{','.join([f'*b{at - 1}'] * 9 if at else 'xxxxx')}]\n" for at in range(9))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text(TRAINING)
    return path


def test_random_ones_end_in_words() -> None:
    rows = run(seed=1, count=80)
    assert [(row.attack, row.tried, row.failures) for row in rows] == [
        (kind, 20, []) for kind in ("values", "texts", "files", "matrices")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2])
def test_many_random_ones_end_in_words(seed: int) -> None:
    assert [row.failures for row in run(seed, 200)] == [[]] * 5  # with commands


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.layers=!!int 'x'", "line 1: x cannot be read as int"),
        ("train.lr=!!float 'x'", "line 1: x cannot be read as float"),
        ("run.check=!!bool 'x'", "line 1: x cannot be read as bool"),
        ("model=!!set 5", "line 1: has the tag tag:yaml.org,2002:set, which says nothing here"),
        ("model.layers=1" + "0" * 30, "is a number beyond 64 bits"),
        ("run.dir=" + "x" * 501, "line 1: is a text of 501 characters, more than 500"),
        ('run.dir="\\0"', "a text has a NUL or half of a surrogate pair"),
        ('run.dir="\\uD800"', "a text has a NUL or half of a surrogate pair"),
        ('run.dir="\\UFFFFFFFF"', "cannot read the value of run.dir as YAML"),
        ("train=&a [*a]", "line 1: stands in itself"),
        ("run={[1]: 2}", "line 1: a list or a section stands as a key"),
        ("mesh.timeout_s=1e10", "mesh.timeout_s = 10000000000.0 should be less than or equal to 1000000"),
        ("mesh.timeout_s=1e-300", "mesh.timeout_s = 1e-300 should be greater than or equal to 1"),
        ("model.d_model=1000000000001", "heads that would: 1, 73, 137"),
        ("a" + ".b" * 30 + "=1", "cannot read the override"),
    ],
)
def test_values_that_no_key_has(file: Path, override: str, told: str) -> None:
    assert told in "\n".join(refusal(training.load, file, override))


def test_a_date_is_a_text(file: Path) -> None:
    assert training.load(file, ["run.dir=2026-13-45"]).run.dir == "2026-13-45"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 3000, "line 1: is nested more than 20 deep"),
        ("{a: " * 2000, "line 1: is nested more than 20 deep"),
        (BOMB, "line 5: has more than 10,000 values"),
        ("a: [" + "1," * 10_000 + "]", "line 1: has more than 10,000 values"),
        ("x" * 1_000_000, "it has more than the 262,144 bytes of one"),
        ("".join(f"k{at}: 1\n" for at in range(4000)), "and more: the first 20 are told"),
    ],
)
def test_texts_without_end(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    lines = refusal(training.load, file)
    assert told in "\n".join(lines)
    assert len("\n".join(lines)) < 20_000


def test_only_regular_files_are_read(tmp_path: Path, file: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "good").symlink_to(file)
    for path, kind in ((tmp_path / "fifo", "a FIFO"), (tmp_path / "link", "a device"), (tmp_path, "a directory")):
        assert refusal(training.load, path) == [
            f"cannot read the configuration {path}: it is {kind}, not a regular file"
        ]
        with pytest.raises(DataError, match=rf"data\.files: cannot read .*: it is {kind}, not a regular file"):
            read([str(path)])
        with pytest.raises(DataError, match=rf"data\.tokens: cannot read .*: it is {kind}, not a regular file"):
            open_tokens(path, "uint16")
    assert refusal(training.load, Path("a\0b"))[0].endswith("embedded null byte")
    assert training.load(tmp_path / "good") == training.load(file)
    assert read([str(tmp_path / "good")]) == file.read_bytes()


def test_what_memory_cannot_hold_is_refused_with_the_numbers(file: Path) -> None:
    check_memory(check_ranks(training.load(file), 2), 2, 2)
    for override in ("model.d_model=1000000000000", "model.layers=100000000", "train.batch=1000000000000"):
        with pytest.raises(ConfigError, match=r"at least \d.* for the 2 ranks of this machine, which has \d.* GB"):
            check_memory(check_ranks(training.load(file, [override]), 2), 2, 2)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("matrix.threads=" + str(list(range(1, 502))), "matrix and cells make 501 cells, more than 500"),
        ("matrix.ranks=1000000", "1,000,000 ranks are more than the 65,536 of a cell"),
        ("matrix.sizes={n: 281474976710656, d: 281474976710656, m: 1}", "elements are more than can be counted"),
        ("matrix={kind: step, train: /dev/zero, ranks: 1}", "it is a device, not a regular file"),
    ],
)
def test_experiments_have_limits(file: Path, override: str, told: str) -> None:
    file.write_text(EXPERIMENT)
    assert told in "\n".join(refusal(experiments.load, file, override))
