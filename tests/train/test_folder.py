"""Which folder a run leaves its results in, and which checkpoint it goes on from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shardgrad.train import folder, resume
from shardgrad.train.config import Config, ConfigError, Model, Train

CONFIG = Config(model=Model(layers=1, heads=3, d_model=12, seq_len=5), train=Train(steps=4, batch=3, lr=0.01))


def made_up(run: Path, *steps: int) -> None:
    """Checkpoints with nothing but their state."""
    for step in steps:
        folder.checkpoint(run, step).mkdir(parents=True)
        state = {"step": step, "config": CONFIG.model_dump()}
        (folder.checkpoint(run, step) / "state.json").write_text(json.dumps(state))


def attempt(monkeypatch: pytest.MonkeyPatch, job: str, restarts: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))


def test_a_restart_finds_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = str(tmp_path / "run")
    for job in ("one", "two", "one"):
        attempt(monkeypatch, job, 0)
        assert folder.find(wanted, None) is None
        folder.create(wanted)
    attempt(monkeypatch, "two", 1)
    assert folder.find(wanted, None) == tmp_path / "run-2"
    attempt(monkeypatch, "one", 3)
    assert folder.find(wanted, None) == tmp_path / "run-3"
    attempt(monkeypatch, "three", 1)  # it ended before it had one
    assert folder.find(wanted, None) is None


def test_jobs_without_a_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    here = folder.job({"TORCHELASTIC_RUN_ID": "none"})
    assert here == folder.job({})
    assert here != "none"
    other = os.getppid() + 1
    monkeypatch.setattr("os.getppid", lambda: other)
    assert folder.job({}) != here
    assert folder.job({"TORCHELASTIC_RUN_ID": "mine"}) == "mine"


def test_auto_goes_on_in_the_one_folder(tmp_path: Path) -> None:
    wanted = str(tmp_path / "run")
    assert folder.find(wanted, "auto") is None
    assert folder.create(wanted, exactly=True) == tmp_path / "run"
    assert folder.find(wanted, "auto") == tmp_path / "run"
    (tmp_path / "other").mkdir()
    (tmp_path / "empty").mkdir()
    assert folder.find(str(tmp_path / "empty"), "auto") is None
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"run.resume = auto: .*other is not the folder of a run: it has no run.json"):
        folder.find(str(tmp_path / "other"), "auto")


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert resume.start_from(run, "auto") is None
    made_up(run, 9, 100, 20)
    (run / "checkpoints" / ".step-00000101.77.partial").mkdir()
    (run / "checkpoints" / ".step-00000004.old").mkdir()
    (run / "checkpoints" / "step-00000200-copy").mkdir()  # the user's own
    assert resume.start_from(run, "auto") == folder.checkpoint(run, 100)
    assert resume.start_from(run, None) == folder.checkpoint(run, 100)  # a restart
    assert resume.start_from(None, str(run)) == folder.checkpoint(run, 100)
    assert resume.start_from(None, str(folder.checkpoint(run, 9))) == folder.checkpoint(run, 9)
    assert resume.start_from(None, None) is None
    with pytest.raises(ConfigError, match=r"run.resume: .* is neither a checkpoint .* nor the folder of a run"):
        resume.start_from(None, str(tmp_path))
    folder.prune(run, 2)
    assert [step for step, _ in folder.checkpoints(run)] == [20, 100]
    folder.sweep(run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        *("step-00000020", "step-00000100", "step-00000200-copy"),
    ]


def test_a_run_folder_is_one_process_s(tmp_path: Path) -> None:
    handle = folder.lock(tmp_path)
    with pytest.raises(ConfigError, match="another process is training in"):
        folder.lock(tmp_path)
    os.close(handle)  # as the kernel does for a killed process
    os.close(folder.lock(tmp_path))


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    made_up(tmp_path, 3)
    start = folder.checkpoint(tmp_path, 3)
    assert resume.check_config(CONFIG, start) == []
    sections = {
        "model": CONFIG.model.model_copy(update={"d_model": 24, "layers": 2}),
        "data": CONFIG.data.model_copy(update={"tokenizer": "bpe", "vocab": 300}),
    }
    with pytest.raises(ConfigError) as error:
        resume.check_config(CONFIG.model_copy(update=sections), start)
    assert str(error.value).splitlines() == [
        f"{start} is a checkpoint of another model:",
        "  model.layers was 1, and is 2 now",
        "  model.d_model was 12, and is 24 now",
        "  data.tokenizer was None, and is 'bpe' now",
        "  data.vocab was None, and is 300 now",
        "set them as they were, or begin another run: run.resume=null, or another run.dir",
    ]


def test_what_may_differ_is_told_where_it_matters(tmp_path: Path) -> None:
    made_up(tmp_path, 3)
    changed = CONFIG.model_copy(
        update={
            "run": CONFIG.run.model_copy(update={"dir": "elsewhere", "resume": "auto"}),
            "mesh": CONFIG.mesh.model_copy(update={"tp": 4}),
            "sample": CONFIG.sample.model_copy(update={"tokens": 1}),
            "model": CONFIG.model.model_copy(update={"dropout": 0.1}),
            "train": CONFIG.train.model_copy(update={"steps": 9, "save_every": 1, "log_every": 3}),
        }
    )
    told = ["model.dropout was 0.0, and is 0.1 now", "train.steps was 4, and is 9 now"]
    assert resume.check_config(changed, folder.checkpoint(tmp_path, 3)) == told
    state = folder.checkpoint(tmp_path, 3) / "state.json"  # as one was written before there was the key
    state.write_text(state.read_text().replace('"dropout": 0.0', '"dropped": 0.0'))
    assert resume.check_config(changed, folder.checkpoint(tmp_path, 3)) == told[1:]


@pytest.mark.parametrize("state", ["", "{", "{}", "[]"])
def test_a_checkpoint_that_cannot_be_read(tmp_path: Path, state: str) -> None:
    made_up(tmp_path, 3)
    start = folder.checkpoint(tmp_path, 3)
    (start / "state.json").write_text(state)
    with pytest.raises(ConfigError, match=r"step-00000003 cannot be read .*: delete it to go on from the one before"):
        resume.check_config(CONFIG, start)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="is no folder"):
        folder.create(str(tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
