"""The examples of every command's `--help`: their files exist, their options are the command's, and they run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import typer
from typer.testing import CliRunner

from shardgrad.cli.app import app

ROOT = Path(__file__).parents[2]
GROUP = typer.main.get_command(app)


def commands(command: typer.main.click.Command, *names: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every command with all of its help's text."""
    options = [str(getattr(parameter, "help", "") or "") for parameter in command.params]
    yield names, "\n".join([command.help or "", command.epilog or "", *options])
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, *names, name)


HELP = dict(commands(GROUP))
EXAMPLES = [example for text in HELP.values() for example in re.findall(r"`(shardgrad [^`]+)`", text)]
QUICK = ("explain", "bench bytes", "bench gpu", "scale configs/scaling/ranks-1024.yaml --dry-run")
"""Of one process, and done in a second or two."""
CHEAP = {  # what an example is given besides, so that it does little; an option's last value counts
    "bench collectives": "--turns 1",
    "bench exact": "--rounds 1 --sizes 64x64x256 --d-model 64 --pieces 8",
    "bench model": "--rounds 1 --d-model 64 --layers 1 --seq-len 16",
    "bench overhead": "--rounds 6",
    "bench overlap": "--rounds 1 --sizes 64x64x256",
    "bench step": "--rounds 1 --sizes 8x64x256",
    "chaos": "--count 1",
    "mutants": "--steps 1",
    "scale": "run.repeats=1 run.warmup=1 matrix.ranks=[1,2] matrix.layout=column run.dir=mine",
    "trace": "model.layers=1 model.d_model=24 model.seq_len=9 train.batch=4",
    "train": "train.steps=3 train.warmup=1 model.layers=1 run.check=false run.dir=mine",
    "verify": "model.layers=1 model.d_model=24 model.seq_len=9",
}
RANKS = ("bench collectives", "bench exact", "bench model", "bench overlap", "bench step", "mutants", "trace", "verify")
"""What ranks run, which torchrun starts."""
LONG = (
    "bench overhead",
    "bench exact",
    "scale configs/scaling/strong.yaml",
    "bench overlap",
    "bench head",
    "chaos",
    "mutants",
    "scale --compare",
)
"""What takes long even so."""


def begins(example: str, *beginnings: str) -> bool:
    return example.removeprefix("shardgrad ").startswith(beginnings)


def examples() -> Iterator[object]:
    """Of a command's slow examples the first is slow, and the others are rare as well."""
    seen: set[str] = set()
    for example in EXAMPLES:
        command = next((command for command in CHEAP if begins(example, command)), example)
        marks = [] if begins(example, *QUICK) else [pytest.mark.slow]
        marks += [pytest.mark.rare] if marks and (begins(example, *LONG) or command in seen) else []
        seen.add(command)
        yield pytest.param(example, marks=marks, id=example)


@pytest.mark.parametrize("names", HELP, ids=" ".join)
def test_files_that_help_names_exist(names: tuple[str, ...]) -> None:
    for path in re.findall(r"\b(?:configs|launch|docs)/[\w./-]*\w", HELP[names]):
        assert (ROOT / path).exists(), f"shardgrad {' '.join(names)} --help names {path}"


def test_every_command_has_examples() -> None:
    for names in HELP:
        assert names in ((), ("bench",)) or f"`shardgrad {' '.join(names)}" in HELP[names]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example: str) -> None:
    command, words = GROUP, shlex.split(example)[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    command.make_context("shardgrad", words)  # raises at an unknown option, or at a value of the wrong type


@pytest.mark.parametrize("example", list(examples()))
def test_examples_run_in_another_folder(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(example)[1:]
    if "--compare" in words:
        for name in words[-2:]:
            make_results(tmp_path / name)
    elif not begins(example, *QUICK):
        words += next((shlex.split(more) for start, more in CHEAP.items() if begins(example, start)), [])
    how = "here" if begins(example, *QUICK, "scale --compare") else "ranks" if begins(example, *RANKS) else "alone"
    status, printed, errors = run(words, how, tmp_path)
    if begins(example, "bench gpu"):
        assert (status, errors.splitlines()[0]) == (2, "torch sees no CUDA device here")
        return
    assert status == 0, printed + errors
    assert printed or begins(example, "train")
    for name in re.findall(r"[\w-]+\.(?:svg|png|json)\b", example):
        assert (tmp_path / name).stat().st_size > 100


def run(words: list[str], how: str, folder: Path) -> tuple[int | None, str, str]:
    """A command's status, and what it prints: run in this process, on ranks forked for it, or in one of its own."""
    if how == "here":
        ran = CliRunner().invoke(app, words)
        return ran.exit_code, ran.stdout, ran.stderr
    if how == "ranks":
        ranks = int(words[words.index("--ranks") + 1]) if "--ranks" in words else 2
        status, printed = forked.command(ranks, *words, directory=folder)
        return status, printed[0], "".join(printed[1:])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "shardgrad", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout, done.stderr


def make_results(folder: Path) -> None:
    words = ["scale", "configs/scaling/strong.yaml", "run.repeats=1", "run.warmup=1", "matrix.ranks=[1]"]
    status, printed, errors = run([*words, "matrix.layout=column", f"run.dir={folder}"], "alone", folder.parent)
    assert status == 0, printed + errors


@pytest.mark.parametrize(("words", "command"), [([], "explain"), (["bench"], "overlap")])
def test_alone_a_group_lists_its_commands(words: list[str], command: str) -> None:
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0
    assert command in ran.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("expalin", "No such command 'expalin'. Did you mean 'explain'?\nshardgrad --help"),
        ("bench stpe", "No such command 'stpe'. Did you mean 'step'?\nshardgrad bench --help"),
        ("chaos layot", "'layot' is not one of layouts, calls"),
        ("mutants by_hnd", "no name of a bug or program contains 'by_hnd'; the programs are "),
        ("mutants --right atention", "no name of a bug or program contains 'atention'"),
        ("verify quickstart --draw errors.gif", "a picture ends in .svg, .png or .pdf, not 'errors.gif'"),
        ("verify quickstart --draw no/errors.svg", "there is no folder "),
        ("trace quickstart --draw .", "a picture ends in"),
        ("bench overlap --backend gloo,shm", "'gloo,shm' is not one of the backends gloo, shm"),
        ("explain colum", "no layout is called 'colum'; the nearest name is 'column'"),
        ("verify quickstart --ranks 0", "Invalid value for '--ranks': "),
    ],
)
def test_errors_have_one_style(words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, words.split())
    assert ran.exit_code == 2, ran.output
    assert ran.stderr.startswith(told)
    assert not set("╭│") & set(ran.stderr)
    assert ran.stdout == ""
