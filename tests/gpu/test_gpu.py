"""What needs a GPU: NCCL on one rank, several ranks on one GPU over gloo, gradients in float32, CUDA graphs.

Skipped without CUDA. `launch/gpu_check.sh` finds out more, with figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.bench.gpu import Product, measure
from shardgrad.bench.gpu_check import capture, syncs
from shardgrad.bench.gpu_check.correctness import check
from shardgrad.bench.gpu_check.finding import Setting
from shardgrad.testing import distributed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@contextmanager
def one_rank_of_nccl() -> Iterator[DeviceMesh]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cuda", (1,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sequence_dim", [None, 0])
def test_nccl_on_one_rank(sequence_dim: int | None) -> None:
    with one_rank_of_nccl() as mesh:
        check(mesh, sequence_dim)


@distributed(world_size=[2, 3])
def test_ranks_share_one_gpu_over_gloo(world_size: int) -> None:
    check(init_device_mesh("cuda", (world_size,), mesh_dim_names=("tp",)), None)


@distributed(world_size=[2, 3])
def test_ranks_share_one_gpu_over_gloo_with_sequence_parallelism(world_size: int) -> None:
    check(init_device_mesh("cuda", (world_size,), mesh_dim_names=("tp",)), 0)


def test_gradients_leave_the_multiplier_in_float32() -> None:
    """Nearer to the float64 sum than micro-batches' gradients that were rounded to bfloat16 before they were added."""
    with one_rank_of_nccl() as mesh:
        torch.manual_seed(2)
        layers = [sg.ColumnParallelLinear(256, 192, bias=False, mesh=mesh, dtype=torch.bfloat16) for _ in range(2)]
        layers[1].load_state_dict(layers[0].state_dict())
        (main,) = sg.use_main_grads(layers[0].parameters())
        rounded, exact = torch.zeros_like(main), torch.zeros_like(main, dtype=torch.float64)
        for _ in range(8):
            x, dy = (torch.randn(512, size, device="cuda").bfloat16() for size in (256, 192))
            exact += dy.double().t() @ x.double()
            layers[0](x).backward(dy)
            layers[1](x).backward(dy)
            rounded += layers[1].weight.grad
            layers[1].weight.grad = None
        assert layers[0].weight.grad is None
        errors = [float((total.double() - exact).norm() / exact.norm()) for total in (main, rounded)]
        assert errors[0] < 1e-5 < errors[1]


def test_the_measurement_runs() -> None:
    with one_rank_of_nccl() as mesh:
        rate, rows = measure([Product("small", 96, 64, True)], 128, mesh, torch.bfloat16, 3, largest=256)
        assert rate > 0
        assert rows[0].plain.median > 0


def test_every_layer_can_be_captured_and_replayed() -> None:
    found = capture.find(Setting(torch.device("cuda"), dry=True))
    assert found.ok, found


def test_no_warm_step_waits_for_the_device() -> None:
    found = syncs.find(Setting(torch.device("cuda"), dry=True))
    assert found.ok, found
