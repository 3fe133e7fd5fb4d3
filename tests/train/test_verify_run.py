"""A configuration's run against one device: what is planted into its parts, its ranks, what is refused."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from test_transformers import LLAMA, configured, make
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from typer.testing import CliRunner

from shardgrad.cli.app import app
from shardgrad.nn.pieces import is_exact
from shardgrad.testing import distributed
from shardgrad.train import optimizer
from shardgrad.train import verify as whole
from shardgrad.train.build import build, mesh_shape
from shardgrad.train.config import Config, check_ranks, default_ranks, load
from shardgrad.train.step import backward
from shardgrad.verification.report import Report

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = {"layers": 1, "heads": 2, "d_model": 6, "seq_len": 4}


def config_of(mesh: dict[str, Any], model: dict[str, Any], **train: Any) -> Config:
    settings = {"steps": 3, "batch": 12, "lr": 0.01, **train}
    data = {"tokens": "nowhere.bin", "vocab": 38}  # which nothing reads
    return Config.model_validate({"mesh": mesh, "data": data, "model": {**TINY, **model}, "train": settings})


def meshed(config: Config) -> tuple[Config, DeviceMesh]:
    """As the command makes it of a configuration, on every rank."""
    ranks = torch.distributed.get_world_size()
    config = whole.check(check_ranks(config, ranks), ranks)
    shape = mesh_shape(config)
    return config, init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))


def verified(config: Config) -> Report:
    return whole.verify_run(*meshed(config))


def of_micro_batches(ranks: int) -> Report:
    return verified(config_of({"dp": ranks}, {"kind": "gpt", "tied": True}, accumulate=2, weight_decay=1.0))


@distributed(world_size=[2, 3], backend="shm")
def test_micro_batches_on_the_axis_of_the_batch(world_size: int) -> None:
    found = of_micro_batches(world_size)
    assert found.ok, found.table()
    assert found.mesh_shape == {"dp": world_size, "tp": 1}
    assert found["blocks.0.mlp.up"].split == "T[a/dp,b,c]"
    assert found["blocks.0.mlp.up#2"].ok  # of the second micro-batch
    assert {row.kind for row in found.rows} >= {"norm", "step"}


@distributed(world_size=[2], backend="shm")
def test_micro_batches_that_are_not_summed(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "all_reduce_partial_grads_", lambda model: None)
    found = of_micro_batches(world_size)
    assert {row.kind for row in found.rows if not row.ok} == {"gradient", "norm", "step", "second step"}
    assert found.first is not None
    assert found.first.kind == "gradient"


@distributed(world_size=[2], backend="shm")
def test_biases_that_decay(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of attention have two dims, as matrices have. One device goes by its own model's dims and names."""

    def by_dims(model: nn.Module, settings: Any) -> torch.optim.Optimizer:
        named = ((name.replace("bias", "b"), one, one.dim() > 1) for name, one in model.named_parameters())
        return optimizer.adamw(named, settings)

    monkeypatch.setattr(whole, "make_optimizer", by_dims)
    wrong = {(row.kind, row.name) for row in of_micro_batches(world_size).rows if not row.ok}
    biases = [f"blocks.0.attention.{name}_bias" for name in ("query", "key", "value")]
    assert wrong == {(kind, name) for kind in ("step", "second step") for name in biases}


@distributed(world_size=[2, 3], backend="shm")
def test_bfloat16_on_sharded_parameters(world_size: int) -> None:
    model = {"kind": "llama", "heads": 3, "kv_heads": 1, "tied": True, "dropout": 0.3}
    more = {"dtype": "bfloat16", "reduce_dtype": "float32", "recompute": "full"}
    found = verified(config_of({"dp": world_size, "fully_sharded": True}, model, **more))
    assert found.ok, found.table()
    assert found.dtype == "bfloat16, parameters float32"
    assert found["blocks.0.mlp.up_weight"].split == "Wu[f/tp,d/dp]"
    assert found["head"].shape == (12, 4, 38)
    assert found["head"].yardstick > 1e-4  # that of bfloat16


@pytest.mark.slow
@distributed(world_size=[2], backend="shm")
def test_adapters_of_a_pretrained_model(world_size: int, tmp_path: Path) -> None:
    if torch.distributed.get_rank() == 0:
        make(tmp_path / "model", LLAMA)
        (tmp_path / "model" / "tokenizer.json").write_text(whole.tokenizer.train("abcabc " * 50, 258).json)
    torch.distributed.barrier()
    given = {"pretrained": str(tmp_path / "model"), "lora": {"rank": 2, "targets": ["q_proj", "down_proj"]}}
    config = configured(tmp_path, given)
    assert whole.vocabulary(whole.check(config, 2)) == 258  # of the model's own tokenizer
    found = verified(config)
    assert found.ok, found.table()
    gradients = {row.name.rpartition("proj.")[2] for row in found.rows if row.kind == "gradient"}
    assert gradients == {"lora_A.default.weight", "lora_B.default.weight"}


@distributed(world_size=[2], backend="shm")
def test_the_loss_in_one_with_the_heads_product(world_size: int) -> None:
    config, mesh = meshed(config_of({"tp": 2}, {"d_model": 8, "kind": "gpt"}, loss="fused"))
    found = whole.verify_run(config, mesh)
    assert found.ok, found.table()
    assert any(row.name == "head.weight" and row.kind == "gradient" for row in found.rows)


@distributed(world_size=[2], backend="shm")
def test_exact_mode(world_size: int) -> None:
    config, mesh = meshed(config_of({"tp": 2}, {"d_model": 8, "kind": "gpt"}, exact=2))
    found = whole.verify_run(config, mesh)
    assert found.ok, found.table()
    assert is_exact(mesh)


@distributed(world_size=[2], backend="shm")
def test_parameters_in_float64_are_computed_and_reduced_in_float64(world_size: int) -> None:
    """Whatever the configuration says, as autocast leaves float64 alone: the same bits as without it."""
    found = []
    for more in ({}, {"dtype": "bfloat16", "reduce_dtype": "float32"}):
        config = check_ranks(config_of({"dp": 1}, {"kind": "llama", "heads": 3}, **more), world_size)
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        torch.manual_seed(0)
        model = build(config, 7, mesh).double()
        loss = backward(model, torch.arange(16).view(4, 4) % 7, torch.arange(16).view(4, 4) % 5)
        found.append([loss, *(p.grad for p in model.parameters())])
    for plain, mixed in zip(*found, strict=True):
        assert plain is not None
        assert mixed is not None
        assert mixed.dtype == torch.float64
        assert torch.equal(plain, mixed)


def test_ranks_that_a_mesh_needs() -> None:
    needed = {"quickstart": 2, "dp-tp": 4, "fully-sharded": 4, "3d": 8, "gpt2-124M": 4, "tiny-llama": 2}
    assert {name: default_ranks(load(CONFIGS / f"{name}.yaml").mesh) for name in needed} == needed
    assert default_ranks(load(CONFIGS / "quickstart.yaml", ["mesh.dp=null", "mesh.tp=null"]).mesh) == 2


def test_the_vocabulary_is_the_runs(tmp_path: Path) -> None:
    def found(*overrides: str) -> int:
        return whole.vocabulary(load(CONFIGS / "quickstart.yaml", overrides))

    assert found() == found("data.tokenizer=bytes") == 256
    assert found("data.tokens=nowhere.bin", "data.vocab=50257") == 50257
    assert found("data.tokenizer=bpe", "data.vocab=300") == 300
    made = tmp_path / "tokenizer.json"
    made.write_text(whole.tokenizer.train("abcabc " * 50, 260).json)
    assert found(f"data.tokenizer={made}") == 260


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("quickstart", ["model.headz=3"], "the nearest key is model.heads"),
        ("fully-sharded", ["--ranks", "3"], "mesh.dp * mesh.tp = 2 * 2, but --ranks is 3: give --ranks 4"),
        ("3d", ["--ranks", "4"], "mesh.grid = [2, 2, 2] has 8 ranks, but --ranks is 4: give --ranks 8"),
        ("gpt2-124M", [], "mesh.device = cuda: a step is verified on the CPU; add mesh.device=cpu"),
        ("llama-1b", ["mesh.device=cpu"], "train.batch=16 model.seq_len=16 model.layers=1 model.d_model=256 model."),
        pytest.param(
            "tiny-llama", ["train.batch=99999"], "it takes about 787 GB to verify a step on 2 ranks",
            marks=pytest.mark.slow,
        ),
        ("finetune", ["model.pretrained=nowhere"], "configs/tiny-llama.yaml has been run"),
        ("quickstart", ["train.exact=2", "train.accumulate=2"], "verify it with train.accumulate=1"),
        ("quickstart", ["data.tokenizer=nowhere.json"], "data.tokenizer: cannot read nowhere.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_verified_is_said_in_one_line(
    name: str, given: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardgrad.train.memory.memory", lambda: 10**11)
    monkeypatch.chdir(CONFIGS.parent)
    done = CliRunner().invoke(app, ["verify", str(CONFIGS / f"{name}.yaml"), *given])
    assert done.exit_code == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not done.stdout


DECODER = ["model.layers=1", "model.heads=4", "model.d_model=16", "model.seq_len=6", "train.batch=4"]
TRANSFORMERS = ["model.seq_len=6", "train.batch=4"]
ON_CPU = [*DECODER, "mesh.device=cpu", "train.accumulate=2"]
MIXED = "bfloat16, parameters float32"
ADAPTER = "lm.base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"
BLOCK = "blocks.0.mlp"
SHIPPED: list[Any] = [
    # name, overrides, mesh, dtype, a parameter, how its gradient is stored
    ("quickstart", DECODER, {"dp": 1, "tp": 2}, "float32", f"{BLOCK}.up.weight", "W[m/tp,d]"),
    ("dp-tp", DECODER, {"dp": 2, "tp": 2}, "float32", f"{BLOCK}.up.weight", "W[m/tp,d]"),
    (
        "fully-sharded", [*DECODER, "model.kv_heads=2"], {"dp": 2, "tp": 2}, "float32", f"{BLOCK}.gate_weight",
        "Wg[f/tp,d/dp]",
    ),
    (
        "3d", [*DECODER, "mesh.grid=[1,2,2]"], {"z": 1, "x": 2, "y": 2}, "float32", f"{BLOCK}.up.weight",
        "W[f/y,d/x/z]",
    ),
    pytest.param(
        "3d", [*DECODER, "mesh.grid=[2,1,2]"], {"z": 2, "x": 1, "y": 2}, "float32", f"{BLOCK}.up.weight",
        "W[f/y,d/x/z]", marks=pytest.mark.rare,
    ),
    ("gpt2-124M", ON_CPU, {"dp": 2, "tp": 2}, MIXED, f"{BLOCK}.up.weight", "W[m/tp,d]"),
    (
        "llama-1b", [*ON_CPU, "model.kv_heads=2", "model.d_ff=24"], {"dp": 2, "tp": 2}, MIXED, f"{BLOCK}.gate_weight",
        "Wg[f/tp,d/dp]",
    ),
    ("tiny-llama", TRANSFORMERS, {"dp": 1, "tp": 2}, "float32", "lm.model.layers.0.mlp.up_proj.weight", "W[f/tp,d]"),
    ("finetune", TRANSFORMERS, {"dp": 1, "tp": 2}, "float32", ADAPTER, "W[f/tp,r]"),
]  # fmt: skip


def test_shipped_configurations_are_all_here() -> None:
    assert {str(getattr(one, "values", one)[0]) for one in SHIPPED} == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given", "mesh", "dtype", "parameter", "stored"), SHIPPED)
def test_a_shipped_configuration_is_verified_as_it_is(
    name: str, given: list[str], mesh: dict[str, int], dtype: str, parameter: str, stored: str, tmp_path: Path
) -> None:
    if name == "finetune":
        make(tmp_path / "model", LLAMA)
        given = [*given, f"model.pretrained={tmp_path / 'model'}"]
    status, told = forked.command(prod(mesh.values()), "verify", CONFIGS / f"{name}.yaml", *given, "--json")
    assert status == 0, told
    found = json.loads(told[0])
    assert (found["ok"], found["mesh"], found["dtype"]) == (True, mesh, dtype)
    rows = {row["name"]: row for row in found["rows"] if row["kind"] == "gradient"}
    assert rows[parameter]["split"] == stored
    activations = {row["split"] for row in found["rows"] if row["kind"] == "output"}
    for axis in (axis for axis, ranks in mesh.items() if ranks > 1):
        assert any(f"/{axis}" in split for split in activations)
    assert {"loss", "output", "gradient", "norm", "step"} <= {row["kind"] for row in found["rows"]}
