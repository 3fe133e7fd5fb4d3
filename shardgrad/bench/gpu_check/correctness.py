"""NCCL on one rank, and gloo on two and three, against one device in float64."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing import spawn  # type: ignore[attr-defined]

import shardgrad as sg
from shardgrad.bench.gpu_check.finding import Finding, Setting, one_rank

N, D, M = 12, 10, 14  # rows, features, hidden features
SEVERAL = (2, 3)  # ranks of gloo
TOLERANCE = 1e-11  # of float64 sums of at most 14 products of normal numbers


def check(mesh: DeviceMesh, sequence_dim: int | None) -> float:
    """The largest difference of Y, dX and both dW of a column and a row parallel layer from one device's.

    By the largest element of each.

    Raises:
        AssertionError: more than rounding.
    """
    device = torch.device(mesh.device_type)
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
        layout = sg.Layout(f"{spec} W[d,m] -> Y[{spec[2:-3]},m]")
        return sg.shard(full.detach().to(device), layout["X"], mesh)

    with torch.no_grad():
        up.weight.copy_(sg.shard(wu.to(device), up.layout(2)["W"], mesh))
        down.weight.copy_(sg.shard(wd.to(device), down.layout(2)["W"], mesh))
    own = shard(x, rows).requires_grad_()
    made = down(F.gelu(up(own)))
    made.backward(shard(dy, rows))
    worst = 0.0
    for got, full, spec in (
        (made, y, None),
        (own.grad, whole[0].grad, None),
        (up.weight.grad, whole[1].grad, up.layout(2)["W"]),
        (down.weight.grad, whole[2].grad, down.layout(2)["W"]),
    ):
        assert got is not None
        assert full is not None
        expected = shard(full, rows) if spec is None else sg.shard(full.detach().to(device), spec, mesh)
        assert got.device.type == device.type
        assert got.shape == expected.shape
        error = float(((got - expected).abs().max() / full.abs().max()).detach()) if got.numel() else 0.0
        assert error <= TOLERANCE, f"{error} is more than rounding"  # and so is NaN
        worst = max(worst, error)
    return worst


def find(setting: Setting) -> Finding:
    """The step."""
    figures = {}
    with one_rank(setting) as mesh:
        name = "nccl, 1 rank" if setting.on_gpu else "gloo, 1 rank"
        figures[name] = max(check(mesh, dim) for dim in (None, 0))
    with tempfile.TemporaryDirectory() as folder:
        spawn(_of_several, (folder, setting.device.type), max(SEVERAL))  # raises what they do
        for ranks in SEVERAL:
            found = Path(folder, f"error of {ranks}").read_text()
            figures[f"gloo, {ranks} ranks, tensors on {setting.device.type}"] = float(found)
    return Finding(figures, "Y, dX and both dW are one device's up to rounding, with and without sequence parallelism")


def _of_several(rank: int, folder: str, device: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=max(SEVERAL))
    try:
        for ranks in SEVERAL:
            mesh = DeviceMesh(device, list(range(ranks)), mesh_dim_names=("tp",))
            if rank < ranks:
                error = max(check(mesh, dim) for dim in (None, 0))
                Path(folder, f"error of {ranks}").write_text(str(error))
            dist.barrier()
    finally:
        dist.destroy_process_group()
