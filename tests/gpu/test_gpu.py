"""What needs a GPU: NCCL on one rank, several ranks on one GPU over gloo, gradients that leave products in float32.

Skipped without CUDA; `launch/gpu_check.sh` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.bench.gpu import Product, measure
from shardgrad.testing import distributed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
N, D, M = 12, 10, 14  # rows, features, hidden features


@contextmanager
def one_rank_of_nccl() -> Iterator[DeviceMesh]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cuda", (1,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


def check(mesh: DeviceMesh, sequence_dim: int | None) -> None:
    """Y, dX and both dW of a column and a row parallel layer, against one device in float64."""
    torch.manual_seed(1)
    x, dy = (torch.randn(N, D, dtype=torch.float64) for _ in range(2))
    wu, wd = torch.randn(M, D, dtype=torch.float64), torch.randn(D, M, dtype=torch.float64)
    whole = [tensor.clone().requires_grad_() for tensor in (x, wu, wd)]
    y = F.linear(F.gelu(F.linear(whole[0], whole[1])), whole[2])
    y.backward(dy)
    up = sg.ColumnParallelLinear(D, M, bias=False, mesh=mesh, sequence_dim=sequence_dim, dtype=torch.float64)
    down = sg.RowParallelLinear(M, D, bias=False, mesh=mesh, sequence_dim=sequence_dim, dtype=torch.float64)
    rows = "X[n/tp,d]" if sequence_dim is not None else "X[n,d]"

    def shard(full: Tensor, spec: str) -> Tensor:
        return sg.shard(full.detach().cuda(), sg.Layout(f"{spec} W[d,m] -> Y[{spec[2:-3]},m]")["X"], mesh)

    with torch.no_grad():
        up.weight.copy_(sg.shard(wu.cuda(), up.layout(2)["W"], mesh))
        down.weight.copy_(sg.shard(wd.cuda(), down.layout(2)["W"], mesh))
    own = shard(x, rows).requires_grad_()
    made = down(F.gelu(up(own)))
    made.backward(shard(dy, rows))
    for got, full, spec in (
        (made, y, None),
        (own.grad, whole[0].grad, None),
        (up.weight.grad, whole[1].grad, up.layout(2)["W"]),
        (down.weight.grad, whole[2].grad, down.layout(2)["W"]),
    ):
        assert got is not None
        assert full is not None
        expected = shard(full, rows) if spec is None else sg.shard(full.detach().cuda(), spec, mesh)
        assert got.is_cuda
        torch.testing.assert_close(got.detach(), expected, rtol=1e-11, atol=1e-11)


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
