"""verify on balanced axes: programs written by hand and models of shardgrad's layers, right and wrong."""

from __future__ import annotations

import pytest
import torch
from hand import D, Hand, M, Single, rows, tp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.testing import distributed


def balanced(world_size: int) -> DeviceMesh:
    mesh = tp(world_size)
    sg.set_balanced(mesh)
    return mesh


class Layers(nn.Module):
    """`Single` of shardgrad's layers."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.norm, self.act = sg.LayerNorm(D, mesh=mesh), nn.GELU()
        self.up = sg.ColumnParallelLinear(D, M, mesh=mesh)
        self.down = sg.RowParallelLinear(M, D, mesh=mesh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(self.norm(x))))


@distributed(world_size=[2, 3])
def test_what_is_right_passes(world_size: int) -> None:
    mesh = balanced(world_size)
    for model in (Hand(mesh), Layers(mesh)):
        report = sg.verify(model, Single(), rows(torch.float32), mesh)
        assert report.ok, report.table()
        assert "/tp," in report["up.weight"].split


@distributed(world_size=[2, 3])
@pytest.mark.parametrize(
    ("bug", "first"),
    [
        ("dX not summed", ("output gradient", "norm")),
        ("rows swapped", ("output", "up")),
        ("Y not summed", ("output", "down")),
    ],
)
def test_what_is_wrong_is_found_where_it_begins(world_size: int, bug: str, first: tuple[str, str]) -> None:
    mesh = balanced(world_size)
    report = sg.verify(Hand(mesh, bug), Single(), rows(torch.float32), mesh)
    assert not report.ok
    assert report.first is not None
    assert (report.first.kind, report.first.name) == first


@distributed(world_size=3)
def test_shards_of_the_other_rule_are_refused_with_the_reason(world_size: int) -> None:
    with pytest.raises(sg.LayoutError, match=r"no way to shard \(7, 6\).*\(3, 6\), \(1, 6\).*the mesh shards balanced"):
        sg.verify(Hand(tp(3)), Single(), rows(torch.float32), balanced(3))
