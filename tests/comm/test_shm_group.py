"""What torch asks a group of shared memory, beside collectives: its name, its devices, its backend, its timeout."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shardgrad.comm import shim
from shardgrad.testing import distributed

CPU = torch.device("cpu")


@distributed(world_size=[2, 3], backend="shm")
def test_a_group_is_known_to_torch_by_its_own_name(rank: int, world_size: int) -> None:
    world, other = dist.group.WORLD, dist.new_group([1, 0], group_desc="a pair")
    groups = [world] if rank > 1 else [world, other]
    for group in groups:
        assert dist.distributed_c10d._resolve_process_group(group.group_name) is group
        assert group._device_types == [CPU]
        assert dist.get_backend(group) == group.name() == "shm"
        assert group.size() == len(dist.get_process_group_ranks(group))
        assert group.get_group_store() is not None
        assert shim.backend(group, CPU) is group
        if hasattr(dist.ProcessGroup, "get_backend"):  # of torch 2.14
            assert group.get_backend(CPU) is group
    assert len({group.group_name for group in groups}) == len(groups)
    assert world.rank() == rank
    if rank < 2:
        assert other.group_desc == "a pair"
        assert other.rank() == rank  # torch sorts
        other.set_timeout(timedelta(seconds=7))
        assert shim.timeout_of(other) == 7
        assert shim.timeout_of(world) != 7


@distributed(world_size=2, backend="shm")
def test_a_call_that_python_cannot_take_over_is_refused(rank: int, world_size: int) -> None:
    """From C++ torch reaches some methods of a Python group only past it: what would send nothing must not pass."""
    group, x = dist.group.WORLD, torch.full((3,), float(rank))
    into = [torch.zeros(3) for _ in range(world_size)]
    with pytest.raises(RuntimeError, match="error_on_collective"):
        dist.ProcessGroup.allgather_coalesced(group, [into], [x])
    assert (x == rank).all()
    dist.all_reduce(x)
    assert (x == sum(range(world_size))).all()
