"""`shardgrad train`: what is shipped is listed, what is wrong is said before a rank starts, and a run is torchrun's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardgrad import shipped
from shardgrad.cli.app import app

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def test_without_a_configuration_those_shipped_are_listed() -> None:
    for command, names in (("train", shipped.names()), ("scale", shipped.names("scaling"))):
        ran = CliRunner().invoke(app, [command])
        assert ran.exit_code == 0, ran.output
        assert all(name in ran.output for name in names)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["quikstart"], "the nearest one that is shipped is quickstart"),
        (["quickstart", "data.files=[no.txt]"], "data.files: cannot read no.txt: No such file or directory"),
        (["dp-tp", "--ranks", "3"], "mesh.dp * mesh.tp = 2 * 2, but --ranks is 3: give --ranks 4"),
        (["quickstart", "train.stepz=1"], "train.stepz is no key; the nearest key is train.steps"),
        (["finetune", "model.made_by=no.yaml"], "cannot read the configuration no.yaml"),
    ],
)
def test_what_is_wrong_is_said_before_a_rank_starts(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.distributed.run.main", lambda *_: pytest.fail("ranks were started"))
    ran = CliRunner().invoke(app, ["train", *arguments])
    assert ran.exit_code == 2
    assert told in ran.output
    assert list(tmp_path.iterdir()) == []


def test_ranks_are_started_by_torchrun_as_many_as_the_mesh_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    for arguments, ranks in (([], 4), (["mesh.dp=3", "train.batch=30"], 6), (["--ranks", "4"], 4)):
        assert CliRunner().invoke(app, ["train", "dp-tp", *arguments]).exit_code == 0
        overrides = [] if "--ranks" in arguments else arguments
        program = ["-m", "shardgrad.train", "dp-tp", *overrides]
        assert started[-1] == ["--standalone", f"--nproc-per-node={ranks}", *program]


@pytest.mark.slow
def test_a_run_from_another_folder_and_a_signal_that_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardgrad", "train", "quickstart", "--ranks", "2", "model.layers=1"]
    short = ["train.warmup=1", "model.d_model=16", "model.seq_len=8", "sample.tokens=0"]
    done = subprocess.run(
        [*command, *short, "train.steps=2", "run.check=false"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
    with subprocess.Popen(
        [*command, *short, "train.steps=1000000", "run.check=false"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as running:  # fmt: skip
        try:
            assert running.stdout is not None
            until = time.monotonic() + 200
            while "tokens/s" not in (line := running.stdout.readline()):
                assert line, "the run ended by itself"
                assert time.monotonic() < until
            running.send_signal(signal.SIGTERM)
            rest = running.stdout.read()
            assert running.wait(60) == 128 + signal.SIGTERM
            assert "To go on: the same command with run.resume=auto" in " ".join(rest.split())
            assert "Traceback" not in rest
        finally:
            running.kill()


@pytest.mark.slow
def test_an_interrupted_command_ends_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardgrad", "bench", "collectives", "--turns", "1000000"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
            until = time.monotonic() + 100
            while len(children.read_text().split()) < 2:
                assert running.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            running.send_signal(signal.SIGINT)
            rest = running.communicate(timeout=60)[0]
            assert running.returncode == 128 + signal.SIGINT
            assert "SignalException" not in rest
        finally:
            running.kill()
