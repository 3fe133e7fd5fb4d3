"""The trace sees what torch.distributed is asked, by anyone, and counts it by the stated convention."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.comm import shim
from shardgrad.layout.notation import Dim
from shardgrad.testing import distributed


@distributed(world_size=[2, 4])
def test_every_kind_of_collective_with_its_axis_and_bytes(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    sg.shard(torch.ones(2), sg.TensorSpec("t", (Dim("n"),)), mesh)  # the mesh is known from here on
    dp = mesh.get_group("dp")
    x = torch.ones(6, 2)
    with sg.trace_collectives() as traced:
        dist.all_reduce(x.clone(), group=dp)
        shim.all_gather_single(torch.empty(12, 2), x, group=dp)
        shim.reduce_scatter_single(torch.empty(3, 2), x, group=dp)
        dist.all_to_all_single(torch.empty_like(x), x, group=dp, async_op=True).wait()
        dist.broadcast(x.clone(), dist.get_process_group_ranks(dp)[0], group=dp)
        dist.all_gather([torch.empty_like(x) for _ in range(2)], x, group=dp)
        first = dist.get_rank(dp) == 0  # keeps 1 row and sends 5; the other one keeps 4 and sends 2
        send, receive = ([1, 5], [1, 2]) if first else ([2, 4], [5, 4])
        dist.all_to_all_single(torch.empty(sum(receive), 2), x, receive, send, group=dp)
        dist.barrier(group=dp)
    assert [(e.operation, e.axis, e.bytes, e.ranks) for e in traced] == [
        ("all-reduce", "dp", 48, 2),
        ("all-gather", "dp", 48, 2),
        ("reduce-scatter", "dp", 24, 2),
        ("all-to-all", "dp", 24, 2),
        ("broadcast", "dp", 48, 2),
        ("all-gather", "dp", 48, 2),
        ("all-to-all", "dp", 40 if first else 16, 2),
    ]
    assert traced.bytes == 240 + (40 if first else 16)
    assert traced.totals()["all-gather", "dp"] == (2, 96)
    assert len(traced) == 7
    assert str(traced).splitlines()[0] == "all-reduce over dp: float32 [6, 2], 48 bytes sent"
    assert repr(traced) == f"Trace(7 collectives, {traced.bytes} bytes sent by this rank)"
    assert traced[-1] is list(traced)[6]
    with sg.trace_collectives() as quiet:
        pass
    assert len(quiet) == 0
    assert str(quiet) == "no collectives"


@distributed(world_size=2)
def test_it_sees_the_gradients_of_ddp_in_backward(world_size: int) -> None:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    with sg.trace_collectives() as traced:
        model(torch.ones(4, 3)).sum().backward()
    assert sum(event.bytes for event in traced if event.operation == "all-reduce") == 4 * (3 * 2 + 2)


@distributed(world_size=2)
def test_the_clock_counts_collectives_and_time_blocked_in_them(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sg.all_reduce(torch.ones(3), mesh)
    with sg.comm_timer() as clock:
        sg.all_reduce(torch.ones(3), mesh)
        sg.all_reduce(torch.ones(3), mesh)
    assert clock.count == 2
    assert clock.seconds > 0
    before = clock.seconds
    sg.all_reduce(torch.ones(3), mesh)
    assert clock.seconds == before
