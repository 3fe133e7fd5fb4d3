"""Experiments as they are run: cells on ranks of their own, failures, interruption, going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardgrad.cli.app import app

ROOT = Path(__file__).parents[2]
CONFIG = """
title: tested
run: {repeats: 2, warmup: 1, timeout_s: 100, pictures: png}
matrix: {layout: row_sequence, bias: true, sizes: {n: 31, d: 17, m: 9}, backend: shm}
cells:
  - {ranks: 2, overlap: 2}
  - {ranks: 2, backend: gloo, label: no network}
  - {ranks: 2, backend: nosuch}
  - {ranks: 2, sizes: {n: 20000000, d: 10000000, m: 3}, label: too large}
  - {ranks: 1}
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shardgrad", "scale", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_cells_run_fail_and_are_skipped_each_alone_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch")  # of gloo's cells alone: they fail
    path, out = tmp_path / "tested.yaml", tmp_path / "out"
    path.write_text(CONFIG)
    mine = {**os.environ, "TMPDIR": str(tmp_path)}  # where the driver tells its ranks what to do
    with subprocess.Popen(
        command(str(path), f"run.dir={out}"), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=mine
    ) as began:
        assert began.stderr is not None
        first = began.stderr.readline()
        assert "1/5  " in first, first
        began.send_signal(signal.SIGTERM)  # the second cell is under way
        said = began.stderr.read()
        assert began.wait(60) == 130, said
    assert "stopped by SIGTERM after 1 of 5 cells; the same command goes on" in said
    _nothing_is_left(tmp_path)
    before = (out / "results.jsonl").read_text()

    done = run(str(path), f"run.dir={out}", "--json")
    assert done.returncode == 1, done.stderr  # a cell failed
    assert (out / "results.jsonl").read_text().startswith(before)
    lines = json.loads(done.stdout)
    assert [line["status"] for line in lines] == ["ok", "failed", "skipped", "skipped", "ok"]
    assert "there already" in done.stderr.splitlines()[0]
    first_line, failed, skipped, large, alone = lines
    assert "rank 0: RuntimeError" in failed["reason"] or "rank 1: RuntimeError" in failed["reason"], failed
    assert failed["stderr"]
    assert "no backend 'nosuch'" in skipped["reason"]
    assert "at least 1.60 PB of memory are needed, " in large["reason"]
    # Y is scattered and dY gathered: each rank sends its half (padded to 16 rows of 9), 4 bytes an element; the bias's
    # gradient comes from the gathered dY.
    assert first_line["bytes_traced"] == [2 * 16 * 9 * 4] * 2 == first_line["bytes_predicted"]
    assert first_line["as_predicted"]
    assert alone["bytes_traced"] == [0]
    for line in (first_line, alone):
        assert len(line["steps"]) == 2
        assert 0 < line["seconds"] < 100
        assert line["flops"] == 6 * 31 * 17 * 9
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(31)
        assert line["machine"]["cores"] >= 1
        assert line["versions"]["torch"]
    for picture in ("time.png", "bytes.png"):
        assert (out / picture).stat().st_size > 5000
    text = (out / "table.txt").read_text()
    assert "no network, tp=2: failed: rank" in text
    compared = run("--compare", str(out), str(out), "--json")
    assert [cell["ratio"] for cell in json.loads(compared.stdout)["cells"]] == [1.0, 1.0]


def _nothing_is_left(folder: Path) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        left = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if str(folder).encode() in _line(pid)]
        if not left:
            return
        time.sleep(0.2)
    raise AssertionError(f"processes are left: {left}")


def _line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_cell_that_hangs_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "slow.yaml"
    path.write_text("title: t\nmatrix: {layout: column, ranks: 1, sizes: {n: 5, d: 3, m: 2}}")
    done = CliRunner().invoke(app, ["scale", str(path), f"run.dir={tmp_path / 'out'}", "run.timeout_s=0.5", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)[0]["reason"] == "ran out of time after run.timeout_s = 0.5 s"


def test_a_wrong_configuration_ends_with_status_2_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("title: t\nmatrix: {layout: column, rnaks: 1}")
    done = CliRunner().invoke(app, ["scale", str(path), f"run.dir={tmp_path / 'out'}"])
    assert done.exit_code == 2
    assert "matrix.rnaks is no key; the nearest key is ranks" in done.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_that_could_run_here_is_no_success(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.yaml"
    path.write_text(CONFIG.partition("cells:")[0].replace("backend: shm", "backend: nosuch, ranks: 2"))
    done = CliRunner().invoke(app, ["scale", str(path), f"run.dir={tmp_path / 'out'}"])
    assert done.exit_code == 1, done.stderr
    assert "no backend 'nosuch'" in done.stdout


@pytest.mark.slow
def test_a_cell_that_is_skipped_leaves_the_other_and_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    path, out = tmp_path / "short.yaml", tmp_path / "out"
    path.write_text(CONFIG.partition("cells:")[0] + "cells: [{ranks: 2, backend: nosuch}, {ranks: 1}]\n")
    seen = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["scale", str(path), f"run.dir={out}", "--json"])
        assert done.exit_code == 0, done.stderr
        seen.append((done.stdout, (out / "results.jsonl").read_bytes()))
    assert seen[0] == seen[1]
    assert "there already" in done.stderr
    skipped, alone = json.loads(seen[0][0])
    assert "no backend 'nosuch'" in skipped["reason"]
    assert (alone["status"], alone["bytes_traced"], alone["as_predicted"]) == ("ok", [0], True)
    assert (out / "time.png").stat().st_size > 5000
