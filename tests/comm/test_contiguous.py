"""Each collective takes tensors however they lie, and hands on contiguous ones: NCCL, and so the late backend, refuses
others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.comm.all_to_all import AllToAll
from shardgrad.comm.collectives import AllGather, AllReduce, AllToAllRows, ReduceScatter
from shardgrad.comm.mesh import axis_on
from shardgrad.errors import CollectiveError
from shardgrad.layout.sizes import chunk
from shardgrad.testing import distributed

LIE: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 2).clone(memory_format=torch.contiguous_format).transpose(0, 2),
    "every other element": lambda x: torch.stack((x, x + 1), -1)[..., 0],
    "columns of a wider tensor": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
}


@distributed(world_size=[2, 3], backend="late")
@pytest.mark.parametrize("lie", LIE)
def test_values(rank: int, world_size: int, lie: str) -> None:
    axis = axis_on(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), "tp")
    terms = [LIE[lie](torch.arange(210.0).reshape(5, 7, 6) * (r + 1)) for r in range(world_size)]
    assert not terms[rank].is_contiguous()
    total = torch.stack(terms).sum(0)
    for dim, size in enumerate(total.shape):
        mine = slice(chunk(size, world_size, rank)[0], sum(chunk(size, world_size, rank)))
        shard = total.movedim(dim, 0)[mine].movedim(0, dim)
        assert torch.equal(ReduceScatter(axis, dim)(terms[rank]), shard)
        assert torch.equal(AllGather(axis, dim, size)(shard), total)
        other = (dim + 1) % 3
        mine = slice(chunk(total.shape[other], world_size, rank)[0], sum(chunk(total.shape[other], world_size, rank)))
        swapped = AllToAll(axis, other, dim, size)(shard)
        assert torch.equal(swapped, total.movedim(other, 0)[mine].movedim(0, other))
    all_reduce = AllReduce(axis)
    assert torch.equal(all_reduce(terms[rank].clone(memory_format=torch.preserve_format)), total)
    assert torch.equal(
        all_reduce.wait(all_reduce.start(LIE[lie](terms[rank]))), torch.stack([LIE[lie](t) for t in terms]).sum(0)
    )
    counts = [5 - rank if to == 0 else 0 for to in range(world_size)]
    taken = [5 - r if rank == 0 else 0 for r in range(world_size)]
    rows = AllToAllRows(axis, counts, taken)(terms[rank][: 5 - rank])
    assert torch.equal(rows, torch.cat([t[: 5 - r] for r, t in enumerate(terms)]) if rank == 0 else total[:0])


@distributed(world_size=2, backend="late")
def test_what_is_handed_on_as_it_lies_is_refused(world_size: int) -> None:
    axis = axis_on(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), "tp")
    collective, x = AllReduce(axis), torch.ones(4, 6).t()
    with pytest.raises(CollectiveError, match="Tensors must be contiguous"):
        collective._begin(x, [x], collective._options)
