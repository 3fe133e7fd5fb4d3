"""The examples of every command's `--help`: their files exist, and their options are the command's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

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


@pytest.mark.parametrize("names", HELP, ids=" ".join)
def test_files_that_help_names_exist(names: tuple[str, ...]) -> None:
    for path in re.findall(r"\b(?:configs|launch|docs)/[\w./-]*\w", HELP[names]):
        assert (ROOT / path).exists(), f"shardgrad {' '.join(names)} --help names {path}"


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example: str) -> None:
    command, words = GROUP, shlex.split(example)[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    command.make_context("shardgrad", words)  # raises at an unknown option, or at a value of the wrong type


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 12
