"""A feed-forward block sharded by hand, of plain local tensors, and the ways in which it can be wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.layout.sizes import chunk

D, M, ROWS = 6, 7, 5  # over 2, 3 and 4 ranks, 7 is 4+3, 3+3+1, 2+2+2+1


class Single(nn.Module):
    """x [n, d] → [n, d]: W₂ gelu(W₁ norm(x) + b₁) + b₂."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, M)
        self.act = nn.GELU()
        self.down = nn.Linear(M, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


class _Up(nn.Module):
    def __init__(self, mesh: DeviceMesh, bug: str) -> None:
        super().__init__()
        own = chunk(M, view(mesh).shape["tp"], mesh.get_local_rank("tp"))[1]
        self.weight, self.bias = nn.Parameter(torch.empty(own, D)), nn.Parameter(torch.zeros(own))
        self.mesh, self.bug = mesh, bug

    def forward(self, x: Tensor) -> Tensor:
        if self.bug != "dX not summed":
            x = sg.replicate(x, self.mesh, "tp")
        if self.bug == "dX summed twice":
            x = sg.replicate(x, self.mesh, "tp")
        weight = self.weight.flip(0) if self.bug == "rows swapped" else self.weight
        y = F.linear(x, weight, None if self.bug == "up bias left out" else self.bias)
        last = self.mesh.get_local_rank("tp") == self.mesh.size() - 1
        return 1.01 * y if self.bug == "one rank scales" and last else y


class _Down(nn.Module):
    def __init__(self, mesh: DeviceMesh, bug: str) -> None:
        super().__init__()
        self.ranks = mesh.size(mesh.mesh_dim_names.index("tp"))
        own = chunk(M, view(mesh).shape["tp"], mesh.get_local_rank("tp"))[1]
        self.weight, self.bias = nn.Parameter(torch.empty(D, own)), nn.Parameter(torch.zeros(D))
        self.mesh, self.bug = mesh, bug

    def forward(self, h: Tensor) -> Tensor:
        y = F.linear(h, self.weight)
        if self.bug == "bias p times":
            y = y + self.bias
        if self.bug == "db divided":
            y = y + self.bias / self.ranks
        if self.bug != "Y not summed":
            y = sg.all_reduce(y, self.mesh, "tp")
        return y if self.bug in ("bias p times", "db divided") else y + self.bias


class Hand(nn.Module):
    """`Single`, its hidden features cut over tp."""

    def __init__(self, mesh: DeviceMesh, bug: str = "", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up, self.act, self.down = _Up(mesh, bug), nn.GELU(), _Down(mesh, bug)
        torch.manual_seed(11 + mesh.get_local_rank("tp"))
        for weight in (self.up.weight, self.down.weight):
            nn.init.normal_(weight)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


def rows(dtype: torch.dtype = torch.float32, count: int = ROWS) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(5)).to(dtype)


def tp(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))


def wrong(report: sg.Report) -> set[tuple[str, str]]:
    return {(row.kind, row.name) for row in report.rows if not row.ok}
