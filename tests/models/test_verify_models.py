"""verify of parallelized models: no right one is accused, planted bugs are found where they begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted_models import BUGS, planted
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from verified import MODELS, batch, both

import shardgrad as sg
from shardgrad.testing import distributed


def tp(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))


def check(kind: str, ranks: int, *, dtype: torch.dtype = torch.float32, labels: bool = True, **options: Any) -> Any:
    if kind == "gemma2":  # it has no other
        options["attention"] = "eager"
    parallel, single = both(kind, tp(ranks), dtype=dtype, **options)
    given = batch(kind, dtype)
    if not labels:
        without = given.pop("labels")
        given |= {"decoder_input_ids": without} if kind == "t5" else {}
    report = sg.verify(parallel, single, given, tp(ranks))
    assert report.ok, report.table()
    return report


QUICK = ("gpt2", "llama", "t5")


@distributed(world_size=[2])
@pytest.mark.parametrize("kind", QUICK)
def test_a_right_model_passes(world_size: int, kind: str) -> None:
    report = check(kind, world_size)
    compared = {(row.kind, row.name.rpartition(".")[2]) for row in report.rows}
    layers = {"gpt2": ("c_attn", "c_proj"), "llama": ("q_proj", "down_proj"), "t5": ("relative_attention_bias", "wo")}
    assert {(k, name) for k in ("output", "output gradient") for name in layers[kind]} <= compared
    assert ("loss", "loss") in compared


@distributed(world_size=[3])
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "attention"), [("", "sdpa"), ("sequence", "eager"), ("no labels", "eager"), ("float64", "sdpa")]
)
@pytest.mark.parametrize("kind", MODELS)
def test_right_models_pass(world_size: int, kind: str, how: str, attention: str) -> None:
    if how == "sequence" and kind == "opt":
        pytest.skip("OPT has no stream of sequences")
    if how == "no labels" and kind == "vit":
        how = ""
    dtype = torch.float64 if how == "float64" else torch.float32
    check(
        kind,
        world_size,
        dtype=dtype,
        labels=how != "no labels",
        sequence=how == "sequence",
        attention=attention,
    )


@distributed(world_size=[2])
@pytest.mark.slow
@pytest.mark.parametrize("heads", [(5, 5), (6, 3), (2, 1), (6, 2)])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2", "phi3", "gemma3"])
def test_heads_that_do_not_divide(world_size: int, kind: str, heads: tuple[int, int]) -> None:
    h, g = heads
    check(kind, world_size, num_attention_heads=h, num_key_value_heads=g, hidden_size=8 * h, attention="eager")


@distributed(world_size=[2])
def test_float32_inside_a_float64_model_is_its_rounding(world_size: int) -> None:
    """Norms and softmax round to float32 there, on one device and on several: the exact step does not."""
    check("llama", world_size, dtype=torch.float64, attention="eager")


ALWAYS = (
    "gate and up are interchanged",
    "the gradient of a norm of heads is not summed",
    "a row parallel product is not summed",
    "KV heads are off by one",
)


@distributed(world_size=[2])
@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in BUGS])
def test_a_planted_bug_is_found_where_it_begins(world_size: int, name: str) -> None:
    one = BUGS[name]
    if one.lora:
        pytest.importorskip("peft")
    parallel, single = both(one.kind, tp(world_size), lora=one.lora, **one.options)
    with planted(one, parallel, tp(world_size)):
        report = sg.verify(parallel, single, batch(one.kind), tp(world_size))
    assert not report.ok
    assert report.first is not None
    assert report.first.kind == one.first[0], report.table()
    assert report.first.name.endswith(one.first[1]), report.table()
    found = {fit.name for diagnosis in report.diagnoses for fit in diagnosis.fits}
    assert not one.named or one.named in found, (found, report.table())
