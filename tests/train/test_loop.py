"""Training on shards is training; what stops it says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain import whole
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed
from shardgrad.train import data
from shardgrad.train.build import build
from shardgrad.train.config import Config, Model, Train
from shardgrad.train.late import TrainingError
from shardgrad.train.loop import held_out_loss, train
from shardgrad.train.metrics import Metrics
from shardgrad.train.optimizer import learning_rate, make_optimizer
from shardgrad.train.report import Report

SIZES = Model(layers=1, heads=3, d_model=12, seq_len=5)
CONFIG = Config(model=SIZES, train=Train(steps=4, batch=3, lr=0.01, warmup=1, log_every=2, eval_every=4))
TEXT = data.part(bytes(i * i % 97 for i in range(400)), 0.2, 5)


def test_learning_rate_rises_and_falls() -> None:
    settings = Train(steps=12, batch=1, lr=2.0, warmup=2)
    rates = [learning_rate(settings, step) for step in range(12)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[7] == pytest.approx(1.1)  # half way down from 2 to a tenth of it
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.2 < rates[-1] < 0.3
    assert learning_rate(Train(steps=1, batch=1, lr=2.0), 0) == 2.0


@distributed(world_size=[2], backend="shm")
def test_matrices_alone_decay(world_size: int) -> None:
    model = build(CONFIG, 7, init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp")))
    decayed, plain = make_optimizer(model, CONFIG.train).param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} == {
        name for name in names.values() if name.endswith("bias") or "norm" in name
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


@distributed(world_size=[2, 3, 4], backend="shm")
def test_trains_as_one_rank_does(world_size: int) -> None:
    meshes = {
        "tp": init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp")),
        "alone": init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("replica", "tp")),
    }
    models, histories = {}, {}
    for axis, mesh in meshes.items():
        torch.manual_seed(4)
        model = models[axis] = build(CONFIG, 256, mesh).double()
        optimizer = make_optimizer(model, CONFIG.train)
        histories[axis] = train(model, optimizer, CONFIG, TEXT, Report(shown=False), Metrics(None))
    together, alone = histories["tp"], histories["alone"]
    assert [step for step, _ in together.train] == [1, 2, 4]
    assert [loss for _, loss in together.train] == pytest.approx([loss for _, loss in alone.train], rel=1e-9)
    assert together.held_out == [(4, pytest.approx(held_out_loss(models["alone"], TEXT, 7), rel=1e-9))]
    assert together.tokens == 4 * 3 * 5
    assert 0 < together.communication_share < 1
    assert alone.communication_share == 0
    for (name, parameter, sharding), other in zip(
        sg.named_shardings(models["tp"]), models["alone"].parameters(), strict=True
    ):
        # Adam divides by |g|: where a gradient is all rounding, as a key bias's is, so is its direction.
        if not name.endswith("key_bias"):
            torch.testing.assert_close(whole(parameter, sharding), other.detach(), rtol=1e-6, atol=1e-8)


@distributed(world_size=[1, 2], backend="shm")
def test_a_loss_that_is_not_finite_stops(world_size: int, tmp_path: Path) -> None:
    model = build(CONFIG, 256, init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp")))
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1: try a lower train.lr \(now 0.01\)"):
        train(model, make_optimizer(model, CONFIG.train), CONFIG, TEXT, Report(shown=False), Metrics(None))
