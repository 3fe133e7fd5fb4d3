"""The norm of KV heads that several query heads share, of which x has one for each query head of a rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.models.norm import FeatureNorm
from shardgrad.nn.heads import Heads
from shardgrad.testing import distributed


@distributed(world_size=2)
def test_each_kv_head_counts_once_wherever_a_rank_begins(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "tp"))
    torch.manual_seed(2)
    for queries, groups in ((6, 2), (6, 3), (4, 1), (12, 3)):
        share, wide = queries // groups, 5
        weight = torch.randn(groups * wide, dtype=torch.float64)
        for ranks in (1, 2, 4, 5):
            for rank in range(ranks):
                heads = Heads.of(queries, groups, ranks, rank)
                x = torch.randn(3, heads.count * wide, dtype=torch.float64)
                owner: Any = SimpleNamespace(mesh=mesh, axis="tp", eps=1e-6, size=groups * wide)
                found = FeatureNorm._for_queries(owner, x, weight, heads)
                none = torch.zeros(3, dtype=torch.float64)
                each = x.view(3, heads.count, wide)
                mine = range(heads.first, heads.first + heads.count)
                total = sum((each[:, at].square().sum(-1) for at, query in enumerate(mine) if query % share == 0), none)
                scale = torch.rsqrt(total / (groups * wide) + 1e-6).view(-1, 1)
                parts = [each[:, at] * scale * weight[query // share * wide :][:wide] for at, query in enumerate(mine)]
                expected = torch.cat([*parts, x[:, :0]], -1)
                torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
