"""Which folder a run leaves its results in, and which checkpoint it goes on from."""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from pathlib import Path

import pytest

from shardgrad import checkpoint, files
from shardgrad.checkpoint import seal
from shardgrad.train import folder, prepare, resume, run_state
from shardgrad.train.config import Config, ConfigError, Model, Train
from shardgrad.train.history import History
from shardgrad.train.metrics import Metrics

CONFIG = Config(model=Model(layers=1, heads=3, d_model=12, seq_len=5), train=Train(steps=4, batch=3, lr=0.01))


def made_up(run: Path, *steps: int) -> None:
    """Checkpoints of nothing but their state."""
    for step in steps:
        where = folder.checkpoint(run, step)
        where.mkdir(parents=True)
        (where / "model.safetensors").touch()
        (where / "optimizer.safetensors").touch()
        own = {"format": 2, "torch": "2", "mesh": {"tp": 1}, "optimizer": None}
        write_state(where, {**own, **run_state.gather(History(step=step, seconds=1.5), "digest", CONFIG, None)})


def write_state(where: Path, state: object) -> None:
    """As it could have been saved."""
    (where / "state.json").write_text(json.dumps(state))
    seal.write_sums(where)


def begun(run: Path, step: int) -> resume.Beginning:
    where = folder.checkpoint(run, step)
    return resume.Beginning(where, checkpoint.verify(where))


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
    (tmp_path / "run" / "run.json").write_text("[]")  # whatever has written there
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
    (tmp_path / "empty" / ".run.json.partial").touch()  # killed while it began
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
    assert resume.start_from(run, "auto") == begun(run, 100)
    assert resume.start_from(run, None) == begun(run, 100)  # a restart
    assert resume.start_from(None, str(run)) == begun(run, 100)
    assert resume.start_from(None, str(folder.checkpoint(run, 9))) == begun(run, 9)
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
    start = begun(tmp_path, 3)
    assert resume.check_config(CONFIG, start) == []
    sections = {
        "model": CONFIG.model.model_copy(update={"d_model": 24, "layers": 2}),
        "data": CONFIG.data.model_copy(update={"tokenizer": "bpe", "vocab": 300}),
    }
    with pytest.raises(ConfigError) as error:
        resume.check_config(CONFIG.model_copy(update=sections), start)
    assert str(error.value).splitlines() == [
        f"{start.path} is a checkpoint of another model:",
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
    assert resume.check_config(changed, begun(tmp_path, 3)) == told
    older = json.loads((folder.checkpoint(tmp_path, 3) / "state.json").read_text().replace("dropout", "dropped"))
    write_state(folder.checkpoint(tmp_path, 3), older)  # as one was written before there was the key
    found = resume.start_from(tmp_path, "auto")
    assert found is not None
    assert resume.check_config(changed, found) == told[1:]


def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made_up(run, 10, 20, 30)
    (folder.checkpoint(run, 30) / "model.safetensors").write_bytes(b"another")
    state = json.loads((folder.checkpoint(run, 20) / "state.json").read_text())
    write_state(folder.checkpoint(run, 20), {**state, "step": 21})
    found = resume.start_from(run, "auto")
    assert found is not None
    assert found.path == folder.checkpoint(run, 10)
    told = list(prepare._passed_over(found, None))
    assert all(one.endswith("(left as it is; nothing was deleted)") for one in told)
    folder.checkpoint(run, 20).with_name("step-00000020.damaged").mkdir()
    told = list(prepare._passed_over(found, run))
    assert "step-00000030/model.safetensors is not the file that was saved: its SHA-256 is ae448ac86c4e…" in told[0]
    assert told[0].endswith("(kept as step-00000030.damaged; nothing was deleted)")
    assert (
        "step-00000020/state.json is not what a run saves:\n    step = 21, in a folder that is named step-0" in told[1]
    )
    assert "history.step = 20, but step = 21" in told[1]
    assert told[1].endswith("(kept as step-00000020.damaged-2; nothing was deleted)")
    assert (run / "checkpoints" / "step-00000030.damaged" / "model.safetensors").read_bytes() == b"another"
    folder.prune(run, 1)
    assert len(list((run / "checkpoints").iterdir())) == 4
    os.unlink(folder.checkpoint(run, 10) / "SHA256SUMS")
    with pytest.raises(
        ConfigError, match=r"^no checkpoint can be gone on with; nothing was deleted:\n  .*SHA256SUMS cannot be read"
    ):
        resume.start_from(run, "auto")
    write_state(folder.checkpoint(run, 10), {"format": 3, "optimizer": None})
    with pytest.raises(ConfigError, match=r"step-00000010 has format 3, and this version of shardgrad reads 2"):
        resume.start_from(run, "auto")
    (folder.checkpoint(run, 10) / "state.json").write_text('{"format": 1}')
    os.unlink(folder.checkpoint(run, 10) / "SHA256SUMS")
    with pytest.raises(ConfigError, match=r"step-00000010 has format 1, and"):
        resume.start_from(None, str(folder.checkpoint(run, 10)))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("step", True, "step = True should be a valid integer"),
        ("mesh", {"tp": 0}, "mesh.tp = 0 should be greater"),
        ("mesh", {}, "mesh = {} Dictionary should have at least 1 item"),
        ("text", None, "text = None should be a valid string"),
        ("history.tokens", 2**70, "history.tokens = 1180591620717411303424 should be less"),
        ("history.held_out", [[1]], "history.held_out.0.1 is missing"),
        ("history.since", [], "history.since = .* must be a section|history.since = .* should be an object"),
        ("history.since.loss", float("nan"), "history.since.loss = nan should be a finite number"),
        ("history.seconds", 0, "history.seconds = 0 after 3 steps"),
        ("random", {}, "random.cpu is missing"),
        ("random.cpu", "", "random.cpu is no random state of torch .*: Expected a CPUGeneratorImplState of size 5056"),
        ("random.cpu", b64encode(bytes(5056)).decode(), "random.cpu is no random state of torch .*: Invalid mt19937"),
        ("random.cpu", "x", "random.cpu is no random state of torch .*: Invalid base64"),
        ("random.cuda", "AAAA", "random.cuda is no random state of torch .*: 3 bytes instead of 16"),
        ("config", [], r"config. = \[\] must be a section"),
        ("config.model.layers", "x", "config.model.layers = 'x' should be a valid integer"),
        ("config.train.lr", {"a": 1}, "config.train.lr = .* should be a valid number"),
        (
            "optimizer",
            {"kind": "SGD", "parameters": [], "numbers": {"a/b": 1}},
            "optimizer is neither null nor its kind",
        ),
    ],
)
def test_a_state_that_no_run_has_saved(tmp_path: Path, key: str, value: object, told: str) -> None:
    made_up(tmp_path, 3)
    start = folder.checkpoint(tmp_path, 3)
    state = json.loads((start / "state.json").read_text())
    *above, last = key.split(".")
    inner = state
    for one in above:
        inner = inner[one]
    inner[last] = value
    write_state(start, state)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(start))}/state.json[^/]*{told}"):
        resume.start_from(tmp_path, "auto")


@pytest.mark.parametrize("name", ["checkpoints", "run.json", "metrics.jsonl", "tokens", "model"])
def test_a_link_in_a_run_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    made_up(tmp_path / "mine", 5)
    folder.create(str(run), exactly=True)
    other.mkdir()
    (other / "run.json").write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(other / "run.json" if "." in name else tmp_path / "mine" / "checkpoints")
    config = CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"dir": str(run), "resume": "auto"})})
    if name != "run.json":
        folder.adopt(run)
    with pytest.raises(ConfigError, match=rf"run.dir: {run / name} is a symbolic link to .*, which is not followed"):
        prepare.prepare(config)


def test_links_that_come_later_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in ("sample.txt", ".report.html.partial", "metrics.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    for name in ("sample.txt", "report.html"):
        files.replace_text(tmp_path / name, "ours")
    with pytest.raises(OSError, match=r"metrics.jsonl is a symbolic link"):
        Metrics(tmp_path / "metrics.jsonl")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "sample.txt").read_text() == "ours"
    assert not (tmp_path / "sample.txt").is_symlink()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["metrics.jsonl", "mine", "report.html", "sample.txt"]


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="is no folder"):
        folder.create(str(tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
