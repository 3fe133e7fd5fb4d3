"""Every configuration that is shipped: valid, and run at a small size, with all that makes it what it is."""

from __future__ import annotations

import json
import warnings
from math import prod
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from test_launch import LAUNCH, ROOT

from shardgrad.train import corpus, data
from shardgrad.train.build import mesh_shape
from shardgrad.train.config import Config, ConfigError, check_ranks, load
from shardgrad.train.foreign import with_tokenizer

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = ["train.steps=2", "train.warmup=1", "train.batch=4", "sample.tokens=0", "mesh.device=cpu", "run.check=true"]
SIZES = ["model.layers=1", "model.d_model=16", "model.seq_len=8", "model.heads=4"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_on_the_ranks_they_name(path: Path) -> None:
    ranks = int(path.read_text().split("--nproc-per-node ")[1].split()[0])
    assert prod(mesh_shape(check_ranks(load(path), ranks)).values()) == ranks


@pytest.mark.parametrize(
    ("name", "more", "ranks"),
    [
        pytest.param("gpt2-124M", ["train.accumulate=2", "mesh.tp=1"], 2, marks=pytest.mark.slow),
        ("llama-1b", ["model.kv_heads=2", "model.d_ff=24", "train.accumulate=2", "mesh.tp=1"], 2),
        pytest.param("dp-tp", ["mesh.tp=1"], 2, marks=pytest.mark.slow),
        pytest.param("fully-sharded", ["mesh.tp=1"], 2, marks=pytest.mark.slow),
        ("3d", ["mesh.grid=[1,2,1]"], 2),
    ],
)
def test_a_small_run(name: str, more: list[str], ranks: int, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    where = [f"run.dir={tmp_path / 'run'}", f"data.files=[{text}]"]
    config = ROOT / "configs" / f"{name}.yaml"
    status, told = forked.run(LAUNCH, ranks, 120, [config, *SMALL, *SIZES, *more, *where])
    assert status == 0, told
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {line["kind"]: line for line in lines}
    assert found["comparison"]["passed"] is True
    assert all(rank["predicted"] == rank["traced"] > 0 for rank in found["bytes"]["by_rank"])
    assert found["end"]["step"] == 2


def config_of(**mesh: object) -> Config:
    return Config.model_validate(
        {
            "mesh": mesh,
            "model": {"layers": 1, "heads": 2, "d_model": 8, "seq_len": 4, "kind": "llama"},
            "train": {"steps": 3, "batch": 12, "accumulate": 2, "lr": 0.1},
        }
    )


@pytest.mark.parametrize(
    ("mesh", "ranks", "told"),
    [
        ({"dp": 2, "tp": 2}, 3, "mesh.dp * mesh.tp = 2 * 2, but 3 processes were started: start torchrun with --nproc"),
        ({"dp": None, "tp": 2}, 3, "mesh.tp = 2 does not divide the ranks: 3 processes were started"),
        ({"dp": 4}, 4, "train.batch / train.accumulate = 12 / 2 = 6 sequences do not divide by mesh.dp = 4"),
        ({"fully_sharded": True}, 2, "mesh.fully_sharded shards weights over dp, but mesh.dp = 1"),
        ({"grid": [1, 2, 2]}, 2, r"mesh.grid = \[1, 2, 2\] has 4 ranks, but 2 processes were started"),
        ({"grid": [4, 1, 1]}, 4, "= 6 sequences do not divide by mesh.grid's z = 4"),
    ],
)
def test_meshes_that_do_not_fit(mesh: dict[str, object], ranks: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("*", r"\*")):
        check_ranks(config_of(**mesh), ranks)


def test_null_is_what_the_other_axis_leaves() -> None:
    for mesh, resolved in (({"dp": None, "tp": 2}, (3, 2)), ({"dp": 3}, (3, 2)), ({"dp": None}, (1, 6)), ({}, (1, 6))):
        found = check_ranks(config_of(**mesh), 6).mesh
        assert (found.dp, found.tp) == resolved


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.kv_heads=3", "model.kv_heads = 3 must divide model.heads = 4"),
        ("train.accumulate=5", "train.batch = 32 does not divide into train.accumulate = 5 micro-batches"),
        ("mesh.grid=[1,1]", "mesh.grid = [1, 1]"),
        ("mesh.grid=[1,1,2]", "mesh.grid is for model.kind = llama, without model.kv_heads and model.tied"),
        ("train.reduce_dtype=bfloat16", "train.reduce_dtype = bfloat16 is narrower than train.dtype = float32"),
        ("train.dtype=float16", "train.dtype = 'float16' should be 'float32' or 'bfloat16'"),
        ("model.kind=bert", "model.kind = 'bert' should be 'gpt' or 'llama'"),
    ],
)
def test_keys_that_do_not_fit(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(ROOT / "configs" / "quickstart.yaml", [override])
    assert told in str(error.value)


def test_rotary_positions_need_pairs() -> None:
    with pytest.raises(ConfigError, match=r"model.d_model / model.heads = 3 must be even"):
        load(ROOT / "configs" / "quickstart.yaml", ["model.kind=llama", "model.d_model=12"])


@pytest.mark.slow
def test_finetuning_makes_its_own_model(tmp_path: Path) -> None:
    """As it is shipped, from a folder with nothing in it but the repository's files."""
    for name in ("configs", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    status, told = forked.run(LAUNCH, 2, 900, ["configs/finetune.yaml"], tmp_path)
    assert status == 0, told
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "tiny-llama" / "model")
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        tuned = peft.PeftModel.from_pretrained(base, str(tmp_path / "runs" / "finetune" / "model"))
    tuned.eval()
    config = with_tokenizer(load(ROOT / "configs" / "finetune.yaml", [f"run.dir={tmp_path}", *_of(tmp_path)]))
    text = corpus.open_corpus(config.data, config.model.seq_len, tmp_path / "runs" / "finetune").text
    total, count = 0.0, 0
    for ids, targets in data.held_out(text, config.train.batch, config.model.seq_len, config.train.eval_batches):
        with torch.no_grad():
            logits = tuned(input_ids=ids).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    lines = [json.loads(line) for line in (tmp_path / "runs" / "finetune" / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = (line["loss"] for line in lines if line["kind"] == "held_out")
    assert total / count == pytest.approx(after, abs=1e-4)
    assert after < before - 0.1


def _of(where: Path) -> list[str]:
    return [f"model.pretrained={where / 'runs' / 'tiny-llama' / 'model'}", "model.made_by=null"]
