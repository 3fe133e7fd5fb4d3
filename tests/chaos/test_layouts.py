"""Layouts of wrong text end in words; and the command that carries all attacks out."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from shardgrad.chaos import layouts
from shardgrad.cli.app import app


def test_random_wrong_texts_are_refused_or_mean_something() -> None:
    rows = layouts.run(seed=1, count=800)
    assert [row.attack for row in rows] == ["letters", "parts"]
    assert [row.failures for row in rows] == [[], []]
    assert sum(row.held for row in rows) == sum(row.tried for row in rows) == 800


def test_a_foreign_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> None:
        raise KeyError(text)

    monkeypatch.setattr(layouts, "Layout", broken)
    assert all(row.held == 0 and "KeyError" in row.failures[0] for row in layouts.run(seed=1, count=20))


def test_the_command_prints_what_held_and_ends_with_status_1_if_something_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = CliRunner().invoke
    good = run(app, ["chaos", "layouts", "--count", "30", "--json"])
    assert good.exit_code == 0
    assert [(row["kind"], row["failures"]) for row in json.loads(good.stdout)] == [("layouts", [])] * 2
    monkeypatch.setattr(layouts, "_failure", lambda *_: "foreign")
    bad = run(app, ["chaos", "layouts", "--count", "30"])
    assert bad.exit_code == 1
    assert "0 of" in bad.stdout
    assert "foreign" in bad.stdout
    wrong = run(app, ["chaos", "nothing"])
    assert wrong.exit_code == 2
    assert "is not one of layouts" in wrong.output
