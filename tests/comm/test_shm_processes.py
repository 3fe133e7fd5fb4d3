"""Shared memory and the process that has it: forked children, open files."""

from __future__ import annotations

import os
import resource

import pytest
import torch
import torch.distributed as dist

from shardgrad.comm.shm.errors import ShmError
from shardgrad.comm.shm.segment import Plan, create
from shardgrad.testing import distributed


@distributed(world_size=2, backend="shm")
def test_a_forked_child_is_refused_and_its_parents_sums_stay_right(world_size: int, rank: int) -> None:
    x = torch.full((3,), float(rank + 1))
    dist.all_reduce(x)
    child = os.fork()
    if child == 0:
        said = 0
        for call in (lambda: dist.all_reduce(torch.full((3,), 1000.0)), lambda: dist.send(x, 1 - rank), dist.barrier):
            try:
                call()
            except RuntimeError as error:
                said += "the process that this one was forked from" in str(error)
        dist.destroy_process_group()  # which must not tell the others that the parent has left
        os._exit(said)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    for _ in range(2):
        x = torch.full((3,), float(rank + 1))
        dist.all_reduce(x)
        assert x.tolist() == [3.0] * 3


@distributed(world_size=2, backend="shm")
def test_a_group_keeps_one_file_open_and_says_when_none_can_be_opened(world_size: int, rank: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    groups = [dist.new_group(backend="shm") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + len(groups)  # the memory's, and none for each other rank
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if rank == 0:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with pytest.raises(ShmError, match=r"no shm group of 2 ranks: this process may have .* raise ulimit -n"):
                create(Plan(2))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
