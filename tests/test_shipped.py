"""Configurations that come with the package: found by name from any folder, and what they read beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardgrad import shipped
from shardgrad.scale.config import load as load_experiment
from shardgrad.settings import ConfigError
from shardgrad.train.config import TransformersModel, load

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_configuration_is_shipped_and_says_what_it_is_for() -> None:
    named = {f"{name}.yaml" for name in (*shipped.names(), *shipped.names("scaling"))}
    assert named == {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")}
    purposes = [shipped.purpose(name.removesuffix(".yaml")) for name in named]
    assert all(20 < len(text) < 125 for text in purposes)
    assert len(set(purposes)) == len(purposes)


@pytest.mark.parametrize("name", ["dp-tp", "dp-tp.yaml", "configs/dp-tp.yaml"])
def test_a_name_is_found_from_any_folder_and_a_file_of_ones_own_comes_first(elsewhere: Path, name: str) -> None:
    assert load(name).mesh.dp == 2
    own = elsewhere / name
    own.parent.mkdir(exist_ok=True)
    own.write_text((CONFIGS / "quickstart.yaml").read_text().replace("layers: 2", "layers: 7"))
    assert load(name).model.layers == 7  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["scaling", "", "..", "../pyproject", "configs", "texts/layouts.md"])
def test_what_is_no_configuration_is_not_found(elsewhere: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load(name)


def test_an_unknown_name_says_the_nearest_one(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match=r"the nearest one that is shipped is quickstart$"):
        load("quikstart.yaml")
    with pytest.raises(ConfigError, match="those shipped are 3d, dp-tp"):
        load("zzz")


def test_what_a_configuration_reads_is_beside_it(elsewhere: Path) -> None:
    model = load("finetune").model
    assert isinstance(model, TransformersModel)
    assert model.made_by == str(CONFIGS / "tiny-llama.yaml")
    assert model.pretrained == "runs/tiny-llama/model"  # which that run leaves where it is started
    assert load("finetune", ["model.made_by=null"]).model.pretrained == "runs/tiny-llama/model"  # type: ignore[union-attr]
    assert all(Path(file).is_file() for file in load("finetune").data.files)
    (elsewhere / "deep").mkdir()
    own = elsewhere / "deep" / "own.yaml"
    own.write_text(
        "model: {pretrained: m, seq_len: 8}\ndata: {files: [a.txt, /b.txt], tokenizer: t.json}\n"
        "train: {steps: 1, batch: 1, lr: 1}"
    )
    read = load("deep/own.yaml")
    assert read.model.pretrained == str(elsewhere / "deep" / "m")  # type: ignore[union-attr]
    assert read.data.files == [str(elsewhere / "deep" / "a.txt"), "/b.txt"]
    assert read.data.tokenizer == str(elsewhere / "deep" / "t.json")
    # An override is typed where one stands, and so is what a run leaves.
    read = load("deep/own.yaml", ["data.files=[c.txt]", "run.dir=here"])
    assert read.data.files == ["c.txt"]
    assert read.run.dir == "here"
    own.write_text(own.read_text().replace("t.json", "bpe, vocab: 300").replace("files: [a.txt, /b.txt], ", ""))
    assert load("deep/own.yaml").data.tokenizer == "bpe"


def test_experiments_read_the_configuration_beside_them(elsewhere: Path) -> None:
    planned = load_experiment("scaling/training").planned
    assert {one.cell.train for one in planned} == {str(CONFIGS / "quickstart.yaml")}
    (elsewhere / "mine.yaml").write_text((CONFIGS / "dp-tp.yaml").read_text())
    (elsewhere / "one.yaml").write_text(
        "title: t\nmatrix: {kind: step}\n"
        "cells: [{train: mine.yaml, mesh: {dp: 2, tp: 2}}, {train: ./mine.yaml, mesh: {dp: 1, tp: 4}}]"
    )
    assert {one.cell.train for one in load_experiment("one.yaml").planned} == {str(elsewhere / "mine.yaml")}


def test_a_file_for_another_command_is_told() -> None:
    for name in shipped.names():
        with pytest.raises(ConfigError, match=f"^{name} is a training configuration: start it by shardgrad train$"):
            load_experiment(name)
    for name in shipped.names("scaling"):
        with pytest.raises(ConfigError, match=f"^{name} is an experiment: start it by shardgrad scale$"):
            load(name)
