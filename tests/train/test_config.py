"""Configurations: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from refused import refusal

from shardgrad.train.config import ConfigError, check_ranks, keys, load

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = """
model: {layers: 1, heads: 3, d_model: 12, seq_len: 5}
train: {steps: 10, batch: 2, lr: 3e-3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_values_defaults_and_overrides(file: Path) -> None:
    config = load(file, ["train.steps=20", "sample.prompt='def '", "data.files=[a.txt, b.txt]", "mesh.tp=null"])
    assert config.train.steps == 20
    assert config.train.lr == 0.003  # YAML 1.1 reads 3e-3 as text
    assert config.sample.prompt == "def "
    assert config.data.files == ["a.txt", "b.txt"]
    assert config.mesh.tp is None
    assert config.run.seed == 0


def test_what_is_written_can_be_read_again(file: Path) -> None:
    config = check_ranks(load(file), 3)
    assert config.mesh.tp == 3
    file.write_text(config.to_yaml())
    assert load(file) == config


def test_quickstart_is_valid() -> None:
    load(QUICKSTART)


def test_every_key_is_described() -> None:
    for key, field in keys():
        assert field.description, key


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.layer=2", "model.layer is no key; the nearest key is model.layers"),
        ("lr=0.1", "lr is no key; the nearest key is train.lr"),
        ("modle.layers=2", "modle is no key; the nearest key is model"),
        ("train.warmpu=2", "train.warmpu is no key; the nearest key is train.warmup"),
        ("model.heads=0", "model.heads = 0 should be greater than or equal to 1"),
        ("model.heads=true", "model.heads = True should be a valid integer"),
        ("model.heads=3.0", "model.heads = 3.0 should be a valid integer"),
        ("train.lr=fast", "train.lr = 'fast' should be a valid number"),
        ("train.lr=nan", "train.lr = nan should be a finite number"),
        ("data.held_out=1", "data.held_out = 1 should be less than 1"),
        ("mesh.device=tpu", "mesh.device = 'tpu' should be 'cpu' or 'cuda'"),
        ("train=3", "train = 3 must be a section with keys of its own"),
        ("model.d_model=", "model.d_model = None should be a valid integer"),
        ("train.warmup=10", "train.warmup = 10 must be less than train.steps = 10"),
        (
            "model.d_model=14",
            "model.d_model = 14 does not divide by model.heads = 3; heads that would: 1, 2, 7",
        ),
    ],
)
def test_bad_keys_and_values(file: Path, override: str, line: str) -> None:
    assert refusal(load, file, override) == [f"the configuration {file} with overrides cannot be used:", f"  {line}"]


def test_all_problems_at_once(file: Path) -> None:
    lines = refusal(load, file, "model.layer=2", "train.batch=-1")
    assert lines[1:] == [
        "  model.layer is no key; the nearest key is model.layers",
        "  train.batch = -1 should be greater than or equal to 1",
    ]


def test_a_key_far_from_all_gets_the_list(file: Path) -> None:
    (line,) = refusal(load, file, "qqqqq.zzzzz=1")[1:]
    assert line == "  qqqqq is no key; the sections and keys are run, mesh, data, model, train, sample"
    (line,) = refusal(load, file, "run.zzzzz=1")[1:]
    assert line.startswith("  run.zzzzz is no key; the keys are run.dir, run.resume, run.seed,")


def test_missing_keys(file: Path) -> None:
    values = yaml.safe_load(SMALL)
    del values["model"]["heads"], values["train"]
    file.write_text(yaml.safe_dump(values))
    assert refusal(load, file) == [
        f"the configuration {file} cannot be used:",
        "  model.heads is missing: attention heads; need not divide by the ranks",
        "  train is missing",
    ]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("steps", "cannot read the override 'steps': write section.key=value, as in train.steps=100"),
        (".steps=1", "cannot read the override '.steps=1': write section.key=value, as in train.steps=100"),
        ("train.lr.x=1", "cannot override train.lr.x: lr is not a section; the nearest key is train.lr"),
        ("train.lr=[1", "cannot read the value of train.lr as YAML:"),
    ],
)
def test_overrides_that_cannot_be_read(file: Path, override: str, reason: str) -> None:
    assert refusal(load, file, override)[0].startswith(reason)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(load, tmp_path / "no.yaml")[0] == (
        f"cannot read the configuration {tmp_path / 'no.yaml'}: No such file or directory"
    )
    file = tmp_path / "some.yaml"
    for text, reason in (
        ("a: [", f"cannot read {file} as YAML: while parsing"),
        ("- 1", f"{file} must hold sections (run, mesh, data, model, train, sample), not [1]"),
        ("run: {seed: 1, seed: 2}", f"cannot read {file} as YAML: line 1: seed stands twice"),
        ("", f"the configuration {file} cannot be used:"),
    ):
        file.write_text(text)
        assert refusal(load, file)[0].startswith(reason)


def test_another_number_of_ranks(file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check_ranks(load(file, ["mesh.tp=4"]), 2)
    assert str(error.value) == (
        "mesh.tp = 4, but 2 processes were started: start torchrun with --nproc-per-node 4, or set mesh.tp=null for "
        "all there are"
    )


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("pretrained: a, layers: 2", "model.layers is no key with model.pretrained or model.config"),
        ("layers: 1, heads: 1, d_model: 2, lora: {}", "model.lora is no key without model.pretrained or model.config"),
        (
            "pretrained: a, config: b",
            "model.pretrained and model.config are both given: the folder has a config.json of its own",
        ),
        ("config: null", "model.pretrained and model.config are both null: name the folder, or the config.json"),
        ("config: a, lora: {}", "model.lora is for model.pretrained: adapters of random weights adapt nothing"),
        ("config: a, made_by: b", "model.made_by leaves model.pretrained: say where"),
        ("pretrained: a, lora: {dropout: 0.1}", "model.lora.dropout = 0.1 should be less than or equal to 0"),
        ("pretrained: a, lora: {r: 2}", "model.lora.r is no key; the nearest key is model.lora.rank"),
    ],
)
def test_models_of_transformers(file: Path, model: str, line: str) -> None:
    assert refusal(load, file, f"model={{seq_len: 5, {model}}}")[1:] == [f"  {line}"]
    assert load(file, ["model={config: a, seq_len: 5}", "model.sequence=false"]).model.seq_len == 5
