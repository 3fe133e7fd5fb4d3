"""What models of others need: dims in parts that are sharded one by one, and products of groups in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardgrad.verification.exact import InFloat64
from shardgrad.verification.splits import of_dtensor


def split(shape: dict[str, int], *placements: Any) -> Any:
    mesh: Any = SimpleNamespace(axes=dict.fromkeys(shape), shape=shape)
    device_mesh = SimpleNamespace(mesh_dim_names=tuple(shape), ndim=len(shape))
    tensor: Any = SimpleNamespace(device_mesh=device_mesh, dim=lambda: 2, placements=placements)
    return of_dtensor(tensor, mesh, "w")


def test_a_dim_in_two_parts_is_told_from_one_that_two_axes_shard() -> None:
    packed = split({"tp": 3}, _StridedShard(1, split_factor=2))  # transformers' packed_colwise
    assert (packed.spec.dims[1].axes, packed.stride) == (("tp",), 2)
    rows = packed.indices((4, 12), {"tp": 3}, {"tp": 1})[1]
    assert rows.tolist() == [2, 3, 8, 9]
    over = split({"dp": 2, "tp": 2}, _StridedShard(0, split_factor=2), Shard(0))  # FSDP2 over tensor parallel
    assert (over.spec.dims[0].axes, over.stride) == (("tp", "dp"), 1)
    both = split({"dp": 2, "tp": 2}, _StridedShard(0, split_factor=4), Shard(0))
    assert (both.spec.dims[0].axes, both.stride) == (("tp", "dp"), 2)
    other = split({"dp": 2, "tp": 2}, Replicate(), _StridedShard(0, split_factor=2))
    assert (other.spec.dims[0].axes, other.stride) == (("tp",), 2)


ENDS = torch.tensor([3, 3, 7], dtype=torch.int32)


@pytest.mark.parametrize(
    ("a", "b"), [((9, 4), (3, 4, 8)), ((3, 8, 4), (4, 9)), ((4, 9), (9, 8)), ((3, 5, 4), (3, 4, 8))]
)
def test_products_of_groups_in_float64(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (a, b))
    ends = None if len(a) == len(b) == 3 else ENDS
    with InFloat64():
        found = torch.nn.functional.grouped_mm(x, y, offs=ends)
    expected: Tensor
    if ends is None:
        expected = torch.einsum("gmk,gkn->gmn", x, y)
    elif len(a) == len(b):
        expected = torch.stack([x[:, :3] @ y[:3], torch.zeros(4, 8, dtype=torch.float64), x[:, 3:7] @ y[3:7]])
    elif len(a) == 2:
        expected = torch.cat([x[:3] @ y[0], x[3:7] @ y[2], torch.zeros(2, 8, dtype=torch.float64)])
    else:
        expected = torch.cat([x[0] @ y[:, :3], x[2] @ y[:, 3:7], torch.zeros(8, 2, dtype=torch.float64)], 1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
