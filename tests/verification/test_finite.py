"""What is not finite is named by all ranks together."""

from __future__ import annotations

import pytest
import torch
from test_replicas import model_of, stepped
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed
from shardgrad.train import data
from shardgrad.train.build import build
from shardgrad.train.config import Config, Model, Train
from shardgrad.train.loop import train
from shardgrad.train.metrics import Metrics
from shardgrad.train.optimizer import make_optimizer
from shardgrad.train.report import Report


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_ranks_name_tensor_rank_and_step(world_size: int, rank: int, bad: float) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = model_of(mesh)
    stepped(model)
    with sg.trace_collectives() as traced:
        sg.check_finite(model)
    assert len(traced) == (world_size > 1)
    odd = world_size - 1
    if rank == odd:
        model[3].weight.grad[2, 0] = bad
    word = "NaN" if bad != bad else "infinite"
    size = model[3].weight.numel()
    with pytest.raises(sg.VerificationError) as caught:
        sg.check_finite(model, step=12)
    assert "not finite at step 12" in str(caught.value)
    assert f"gradient of 3.weight on rank {odd}: of " in str(caught.value)
    assert f"elements 1 {word}" in str(caught.value)
    if rank == odd:
        assert f"of {size} elements" in str(caught.value)
        model[3].weight.grad.zero_()
    sg.check_finite(model)
    with torch.no_grad():
        model[0].weight[1] = bad
    with pytest.raises(sg.VerificationError) as caught:
        sg.check_finite(model)
    assert str(caught.value).count("value of 0.weight on rank ") == world_size


@pytest.mark.slow
@distributed(world_size=4)
def test_the_other_axis_hears_of_it(world_size: int, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = sg.RowParallelLinear(6, 3, mesh=mesh)
    with torch.no_grad():
        if rank == 2:
            layer.weight[0, 0] = torch.nan
    with pytest.raises(sg.VerificationError, match="value of weight on rank 2: of 9 elements 1 NaN"):
        sg.check_finite(layer)


@distributed(world_size=2)
def test_plain_models_empty_shards_and_16_bit(world_size: int, rank: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    plain = nn.Linear(2, 3, dtype=torch.float16)
    with pytest.raises(ValueError, match="pass mesh="):
        sg.check_finite(plain)
    sg.check_finite(plain, mesh=mesh)
    if rank:
        plain.bias.grad = torch.full((3,), 70000.0).half()
    with pytest.raises(sg.VerificationError, match="gradient of bias on rank 1: of 3 elements 3 infinite"):
        sg.check_finite(plain, mesh=mesh)
    sg.check_finite(sg.ColumnParallelLinear(3, 1, mesh=mesh))  # nothing of it on rank 1


@distributed(world_size=2)
def test_training_checks_every_so_many_steps(world_size: int, rank: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    sizes = Model(layers=1, heads=3, d_model=12, seq_len=5)
    text = data.part(bytes(i * i % 97 for i in range(400)), 0.2, 5)

    def run(check_every: int) -> None:
        settings = Train(steps=3, batch=3, lr=0.01, log_every=9, eval_every=9, check_every=check_every)
        torch.manual_seed(4)
        model = build(Config(model=sizes, train=settings), 256, mesh)
        model.norm.weight.register_hook(lambda grad: grad * (1 + rank))  # ranks take steps of their own
        optimizer = make_optimizer(model, settings)
        train(model, optimizer, Config(model=sizes, train=settings), text, Report(shown=False), Metrics(None))

    run(0)
    with pytest.raises(sg.VerificationError, match=r"come apart at step 2(.|\n)*gradient of norm\.weight"):
        run(2)
