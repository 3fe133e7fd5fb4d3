"""Models of transformers, trained by the launcher's own run: what is left loads into plain transformers and peft."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from launched import launched
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed
from shardgrad.train import data, folder
from shardgrad.train.build import mesh_shape
from shardgrad.train.config import Config, ConfigError, check_ranks
from shardgrad.train.foreign import check, describe, with_tokenizer
from shardgrad.train.metrics import read
from shardgrad.train.prepare import prepare
from shardgrad.train.stages import stages

TEXT = "".join(f"line {i} of {i * i % 97}: {'abcdefgh'[i % 8 :]}\n" for i in range(120))
STEPS = 3
TINY = {"vocab_size": 259, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
_LLAMA = {"model_type": "llama", "intermediate_size": 20, "num_key_value_heads": 3, "max_position_embeddings": 16}
LLAMA = {**TINY, **_LLAMA}
GPT2 = {"model_type": "gpt2", "vocab_size": 259, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
OPT = {**TINY, "model_type": "opt", "ffn_dim": 20, "word_embed_proj_dim": 24, "max_position_embeddings": 16}


def shared(tmp_path: Path, write: Callable[[], None]) -> Path:
    """A folder in the one that all ranks share, which the first fills."""
    if torch.distributed.get_rank() == 0:
        write()
    torch.distributed.barrier()
    return tmp_path


def make(where: Path, values: dict[str, Any] = LLAMA) -> None:
    """A model on one device, in a folder."""
    import transformers as hf  # here: it costs seconds, and a process that collects the tests runs few of them

    config = hf.CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    torch.manual_seed(5)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(where)


def configured(where: Path, model: dict[str, Any], **changed: dict[str, Any]) -> Config:
    sections = {
        "run": {"dir": str(where / "run"), "resume": "auto", "seed": 3},
        "model": {"seq_len": 8, **model},
        "data": {"files": [str(where / "text.txt")], "held_out": 0.2},
        "train": {
            "steps": STEPS, "batch": 4, "lr": 0.01, "clip": 1.0, "log_every": 1, "eval_every": 3, "eval_batches": 2
        },
        "sample": {"prompt": "li", "tokens": 2},
    }  # fmt: skip
    merged = {name: {**values, **changed.get(name, {})} for name, values in sections.items()}
    return Config.model_validate({**merged, "mesh": changed.get("mesh", {})})


def go(config: Config) -> None:
    """What the launcher does on every rank, but for the page."""
    config = with_tokenizer(check_ranks(config, torch.distributed.get_world_size()))
    shape = mesh_shape(config)
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    launched(mesh, config)


def loss_of(model: Any, config: Config) -> float:
    """The held-out loss as the loop measures it, of a plain model."""
    text = data.part(Path(config.data.files[0]).read_bytes(), config.data.held_out, config.model.seq_len)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, targets in data.held_out(text, config.train.batch, config.model.seq_len, config.train.eval_batches):
            logits = model.eval()(input_ids=ids).logits
            total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += targets.numel()
    return total / count


def last_loss(run: Path) -> float:
    return read(run / folder.METRICS)[-1]["held_out"]


def first_comparison(run: Path) -> dict[str, Any]:
    return next(line for line in read(run / folder.METRICS) if line["kind"] == "comparison")


@pytest.mark.slow
@distributed(world_size=[2], backend="shm")
@pytest.mark.parametrize(
    ("values", "more"),
    [
        (LLAMA, {}),
        (LLAMA, {"mesh": {"dp": 2, "tp": 1}, "train": {"accumulate": 2, "recompute": "full"}}),
        pytest.param(GPT2, {"train": {"dtype": "bfloat16", "reduce_dtype": "float32"}}, marks=pytest.mark.slow),
        pytest.param(OPT, {"model": {"sequence": False}}, marks=pytest.mark.slow),
        pytest.param(LLAMA, {"mesh": {"dp": 2, "tp": 1, "fully_sharded": True}}, marks=pytest.mark.slow),
    ],
    ids=["llama", "micro-batches", "gpt2", "opt", "fully sharded"],
)
def test_plain_transformers_loads_what_is_left(
    world_size: int, values: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def write() -> None:
        (tmp_path / "text.txt").write_text(TEXT)
        make(tmp_path / "base", values)

    where = shared(tmp_path, write)
    model = {"pretrained": str(where / "base"), **more.pop("model", {})}
    config = configured(where, model, **more)
    go(config)
    assert first_comparison(where / "run")["passed"]
    left = AutoModelForCausalLM.from_pretrained(where / "run" / "model")
    near = 2e-2 if config.train.dtype == "bfloat16" else 1e-5
    assert loss_of(left, config) == pytest.approx(last_loss(where / "run"), abs=near)
    before = AutoModelForCausalLM.from_pretrained(where / "base")
    at_first = next(line["loss"] for line in read(where / "run" / folder.METRICS) if line["kind"] == "held_out")
    assert loss_of(before, config) == pytest.approx(at_first, abs=near)
    assert abs(loss_of(left, config) - at_first) > 0.01
    said, found = (json.loads((path / "config.json").read_text()) for path in (where / "base", where / "run" / "model"))
    assert found == said
    encoder = AutoTokenizer.from_pretrained(where / "run" / "model")
    assert encoder("line 7é")["input_ids"] == list("line 7é".encode())
    assert encoder.decode(list("line 7é".encode())) == "line 7é"


@distributed(world_size=[2], backend="shm")
@pytest.mark.slow
@pytest.mark.parametrize("values", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_adapters_alone_are_trained(world_size: int, values: dict[str, Any], tmp_path: Path) -> None:
    """Base values stay as they are; peft loads the adapters beside them; a resumed run ends with the same bits."""
    import peft
    from transformers import AutoModelForCausalLM

    def write() -> None:
        (tmp_path / "text.txt").write_text(TEXT)
        make(tmp_path / "base", values)

    where = shared(tmp_path, write)
    targets = ["c_attn", "c_proj"] if values["model_type"] == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    model = {"pretrained": str(where / "base"), "lora": {"rank": 3, "alpha": 5, "targets": targets}}
    config = configured(where, model)
    go(config)
    assert first_comparison(where / "run")["passed"]
    saved = load_file(folder.checkpoints(where / "run")[-1][1] / "model.safetensors")
    assert saved
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert all(tensor.abs().max() > 0 for tensor in saved.values())

    base = AutoModelForCausalLM.from_pretrained(where / "base")
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        plain = peft.PeftModel.from_pretrained(base, str(where / "run" / "model"))
    assert loss_of(plain, config) == pytest.approx(last_loss(where / "run"), abs=1e-5)
    adapters = load_file(where / "run" / "model" / "adapter_model.safetensors")
    assert sorted(map(tuple, (t.shape for t in adapters.values()))) == sorted(tuple(t.shape) for t in saved.values())
    untouched = AutoModelForCausalLM.from_pretrained(where / "base")
    for one, other in zip(plain.merge_and_unload().parameters(), untouched.parameters()):
        assert one.shape == other.shape

    again = configured(where, model, run={"dir": str(where / "again")}, train={"save_every": 1})
    stopped = again.model_copy(update={"train": again.train.model_copy(update={"steps": 2})})
    with pytest.MonkeyPatch.context() as patched:  # the schedule is that of the whole run
        patched.setattr("shardgrad.train.loop.learning_rate", lambda _, step: 0.01 / (1 + step))
        go(stopped)
        go(again)
        go(configured(where, model, run={"dir": str(where / "whole")}))
    resumed, whole = (folder.checkpoints(where / name)[-1][1] for name in ("again", "whole"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = load_file(resumed / name), load_file(whole / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name

    shared(tmp_path, lambda: (tmp_path / "base" / "config.json").write_text(json.dumps({**values, "seed": 1})) and None)
    further = again.model_copy(update={"train": again.train.model_copy(update={"steps": 4})})
    with pytest.raises(ValueError, match="its files have changed since"):
        go(further)


@distributed(world_size=[1, 2, 3], backend="shm")
@pytest.mark.slow
def test_random_weights_are_the_same_on_any_mesh(world_size: int, tmp_path: Path) -> None:
    from shardgrad.train.build import build_model

    def write() -> None:
        (tmp_path / "llama.json").write_text(json.dumps(LLAMA))

    where = shared(tmp_path, write)
    config = check_ranks(configured(where, {"config": str(where / "llama.json")}), world_size)
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp"))
    model = build_model(config, 256, mesh)
    torch.manual_seed(3)
    alone = describe(config.model).make("cpu")
    found = sg.state_dict(model)
    assert found.keys() == {f"lm.{name}" for name, _ in alone.named_parameters()}
    for name, whole in alone.named_parameters():
        assert torch.equal(found[f"lm.{name}"], whole), name


@distributed(world_size=[3], backend="shm")
@pytest.mark.slow
def test_random_weights_are_trained(world_size: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def write() -> None:
        (tmp_path / "text.txt").write_text(TEXT)
        (tmp_path / "llama.json").write_text(json.dumps(LLAMA))

    where = shared(tmp_path, write)
    config = configured(where, {"config": str(where / "llama.json")}, data={"tokenizer": "bpe", "vocab": 259})
    go(config)
    assert first_comparison(where / "run")["passed"]
    encoder = AutoTokenizer.from_pretrained(where / "run" / "model")
    assert encoder.decode(encoder("line 7")["input_ids"]) == "line 7"
    second = configured(where, {"pretrained": str(where / "run" / "model")}, run={"dir": str(where / "second")})
    assert with_tokenizer(second).data.tokenizer == str(where / "run" / "model" / "tokenizer.json")
    go(second)
    lines = read(where / "second" / folder.METRICS)
    assert lines[0]["vocab"] == len(encoder)
    begun = next(line["loss"] for line in lines if line["kind"] == "held_out")
    assert begun == pytest.approx(last_loss(where / "run"), abs=1e-5)


def refused(tmp_path: Path, model: dict[str, Any], **more: dict[str, Any]) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ConfigError) as error:
        prepare(with_tokenizer(check_ranks(configured(tmp_path, model, **more), 1)))
    told = str(error.value)
    assert "\n" not in told
    assert not (tmp_path / "run").exists()
    return told


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert refused(tmp_path, {"pretrained": "org/name"}) == (
        "model.pretrained: there is no folder org/name (nothing is downloaded: name a folder on this machine)"
    )
    base.mkdir()
    told = refused(tmp_path, {"pretrained": str(base)})
    assert "has no config.json: it is no folder in Hugging Face's format" in told
    (base / "adapter_config.json").write_text("{}")
    assert "holds an adapter alone" in refused(tmp_path, {"pretrained": str(base)})
    (base / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mamba"}))
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path, {"pretrained": str(base)})
    (base / "model.safetensors").write_bytes(b"")
    told = refused(tmp_path, {"pretrained": str(base)})
    assert "has model_type = 'mamba', of which no plan is known; known are bert, gemma2" in told
    for text, reason in (
        ("{", "is no JSON"),
        ("[]", "has model_type = None"),
        (json.dumps({"model_type": "bert"}), "is of a bert, which is no causal language model"),
        (json.dumps({**LLAMA, "quantization_config": {}}), "is of a quantized model"),
        (json.dumps({**LLAMA, "hidden_size": "many"}), "is not taken by transformers"),
    ):
        (base / "config.json").write_text(text)
        assert reason in refused(tmp_path, {"pretrained": str(base)})


def test_models_that_cannot_be_trained_so(tmp_path: Path) -> None:
    for name, values in (("llama", LLAMA), ("opt", OPT)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    llama = {"config": str(tmp_path / "llama.json")}
    assert "model.seq_len = 17 is more than the 16 positions of" in refused(tmp_path, {**llama, "seq_len": 17})
    told = refused(tmp_path, {"config": str(tmp_path / "opt.json")})
    assert told.startswith("model.sequence = true: OPT's layers merge batch and sequence")
    assert told.endswith("Set model.sequence=false")
    told = refused(tmp_path, llama, data={"tokenizer": "bpe", "vocab": 300})
    assert "data.tokenizer = bpe has" in told
    assert "but the model knows 259 (vocab_size)" in told
    assert "cannot read" in refused(tmp_path, {"config": str(tmp_path / "no.json")})
    make(tmp_path / "base")
    lora = {"pretrained": str(tmp_path / "base"), "lora": {"targets": ["c_attn"]}}
    assert refused(tmp_path, lora).startswith("model.lora: Target modules")


def test_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    make(tmp_path / "base")
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    (tmp_path / "base" / "evil.py").write_text("raise SystemExit('run')\n")
    section = configured(tmp_path, {"pretrained": str(tmp_path / "base")}).model
    check(section)  # type: ignore[arg-type]
    assert type(describe(section).make("meta")) is LlamaForCausalLM  # type: ignore[arg-type]


def test_a_run_before_that_makes_the_model(tmp_path: Path) -> None:
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    (tmp_path / "text.txt").write_text(TEXT)
    first = configured(tmp_path, {"config": str(tmp_path / "llama.json")}, run={"dir": str(tmp_path / "first")})
    (tmp_path / "first.yaml").write_text(first.to_yaml())
    model = {"pretrained": str(tmp_path / "first" / "model"), "made_by": str(tmp_path / "first.yaml")}

    def found(**more: object) -> list[Config]:
        return stages(check_ranks(configured(tmp_path, {**model, **more}), 1), 1)

    one, two = found()
    assert (one.run.dir, one.run.resume) == (str(tmp_path / "first"), "auto")
    assert two.run.dir == str(tmp_path / "run")
    for more, told in (
        ({"pretrained": str(tmp_path / "other")}, "which model.pretrained = "),
        ({"seq_len": 17}, "model.seq_len = 17 is more than the 16 positions of"),
        ({"lora": {"targets": ["c_attn"]}}, "model.lora: Target modules"),
        ({"made_by": str(tmp_path / "no.yaml")}, "cannot read the configuration"),
    ):
        with pytest.raises(ConfigError, match=told):
            found(**more)
    (tmp_path / "first" / "model").mkdir(parents=True)
    assert found() == [two]
