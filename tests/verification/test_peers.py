"""Released tensor-parallel layers of others: what is right passes, and a known mistake is found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import shardgrad as sg
from shardgrad.testing import distributed

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Block(nn.Module):
    """x [n, d] → [n, d]."""

    def __init__(self, d: int = 8, m: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, m)
        self.down = nn.Linear(m, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtensor(world_size: int, sequence: bool, dtype: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    single = Block()
    model = Block().to(getattr(torch, dtype))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence:
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0)),
        }
    parallelize_module(model, mesh, plan)
    torch.manual_seed(3)
    whole = torch.randn(12, 8, dtype=getattr(torch, dtype))
    part = whole.chunk(world_size)[mesh.get_local_rank()] if sequence else whole
    report = sg.verify(model, single, whole, mesh, parallel_batch=part)
    assert report.ok, report.table()
    kinds = {(row.kind, row.name) for row in report.rows}
    expected = {("gradient", name) for name, _ in single.named_parameters()}
    expected |= {("output", "up"), ("output gradient", "up"), ("input gradient", "input 0"), ("step", "up.weight")}
    if sequence:  # torch clips DTensors alone
        expected |= {("norm", "all gradients")}
    assert expected <= kinds, report.skipped


@contextmanager
def megatron(ranks: int) -> Iterator[object]:
    state = pytest.importorskip("megatron.core.parallel_state")
    config = pytest.importorskip("megatron.core.model_parallel_config")
    state.destroy_model_parallel()  # what an earlier test in these processes may have left
    state.initialize_model_parallel(ranks)
    try:
        yield config.ModelParallelConfig(
            tensor_model_parallel_size=ranks, params_dtype=torch.float32, use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )  # fmt: skip
    finally:
        state.destroy_model_parallel()


class MegatronBlock(nn.Module):
    def __init__(self, config: object, d: int = 8, m: int = 24) -> None:
        from megatron.core.tensor_parallel import layers

        super().__init__()
        options = {"config": config, "init_method": nn.init.xavier_normal_, "bias": True, "skip_bias_add": False}
        self.norm = nn.LayerNorm(d)
        self.up = layers.ColumnParallelLinear(d, m, gather_output=False, **options)
        self.down = layers.RowParallelLinear(m, d, input_is_parallel=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))[0]))[0]


@distributed(world_size=[2, 4])
def test_megatron(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    with megatron(world_size) as config:
        torch.manual_seed(torch.distributed.get_rank())
        model = MegatronBlock(config)
        for parameter in (model.norm.weight, model.down.bias):
            torch.distributed.broadcast(parameter.data, 0)
        report = sg.verify(model, Block(), torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), mesh)
        assert report.ok, report.table()
        assert report["up.weight"].shape == (24, 8)
        assert {("output", "up"), ("output gradient", "up")} <= {(row.kind, row.name) for row in report.rows}


@distributed(world_size=[2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_megatrons_label_smoothing_uses_the_local_vocabulary(world_size: int, smoothing: float) -> None:
    """NVIDIA/Megatron-LM issue #737."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    with megatron(world_size) as config:
        from megatron.core.tensor_parallel import layers, vocab_parallel_cross_entropy

        head = layers.ColumnParallelLinear(
            6, 20, config=config, init_method=nn.init.xavier_normal_, bias=False, gather_output=False
        )
        generator = torch.Generator().manual_seed(1)
        batch = torch.randn(7, 6, generator=generator), torch.randint(0, 20, (7,), generator=generator)
        report = sg.verify(
            head,
            nn.Linear(6, 20, bias=False),
            batch,
            mesh,
            loss=lambda model, x, y: F.cross_entropy(model(x), y, label_smoothing=smoothing),
            parallel_loss=lambda model, x, y: vocab_parallel_cross_entropy(
                model(x)[0].clone(), y, label_smoothing=smoothing
            ).mean(),
        )
        wrong = {(row.kind, row.name) for row in report.rows if not row.ok}
        if smoothing:
            assert {("loss", "loss"), ("gradient", "weight"), ("output gradient", "(model)")} <= wrong
            assert report.first is not None
            assert report.first.kind == "loss"
            assert ("output", "(model)") not in wrong
        else:
            assert report.ok, report.table()


@distributed(world_size=[2])
def test_fairscale(world_size: int) -> None:
    fairscale = pytest.importorskip("fairscale.nn.model_parallel")
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    fairscale.initialize_model_parallel(world_size)
    try:
        from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

        model = nn.Sequential(
            VocabParallelEmbedding(12, 8),
            ColumnParallelLinear(8, 20, gather_output=False),
            nn.GELU(),
            RowParallelLinear(20, 6, input_is_parallel=True),
        )
        single = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 6))
        ids = torch.randint(0, 12, (3, 5), generator=torch.Generator().manual_seed(2))
        report = sg.verify(model, single, ids, mesh)
        assert report.ok, report.table()
        assert {row.name for row in report.rows if row.kind == "gradient"} == {n for n, _ in single.named_parameters()}
        assert {("output", "1"), ("output gradient", "1")} <= {(row.kind, row.name) for row in report.rows}
    finally:
        fairscale.destroy_model_parallel()
