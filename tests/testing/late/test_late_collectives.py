"""Every collective on the late backend gives what it must, at once or asynchronously, in every dtype that NCCL has."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.testing import distributed
from shardgrad.testing.late.memory import is_poisoned

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.int8,
)
Call = Callable[[bool], object]


def made(rank: int, n: int, dtype: torch.dtype) -> Tensor:
    """Small integers, other ones on each rank."""
    return (torch.arange(n) % 5 + rank + 1).to(dtype)


def run(asynchronous: bool, call: Call, outs: list[Tensor]) -> None:
    """The call; asynchronously its results are poison until the wait, however long one does not wait."""
    work = call(asynchronous)
    if not asynchronous:
        assert work is None
        return
    assert isinstance(work, dist.Work)
    while not work.is_completed():
        time.sleep(0.001)
    assert all(is_poisoned(out) for out in outs)
    work.wait()


@distributed(world_size=[1, 2, 3, 4], backend="late")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_values(rank: int, world_size: int, asynchronous: bool) -> None:
    ranks, root = range(world_size), world_size - 1
    for at, dtype in enumerate(DTYPES):
        n = (0, 1, 7, 1001)[at % 4]
        x = made(rank, n, dtype)
        all_of = [made(r, n, dtype) for r in ranks]
        total = torch.stack([each.double() for each in all_of]).sum(0).to(dtype)
        for op, want in {
            "SUM": total,
            "MAX": all_of[-1],
            "MIN": all_of[0],
        }.items():
            y = x.clone()
            run(asynchronous, lambda a, y=y, op=op: dist.all_reduce(y, getattr(dist.ReduceOp, op), async_op=a), [y])
            assert torch.equal(y, want), (dtype, op)
        y = x.clone()
        run(asynchronous, lambda a, y=y: dist.reduce(y, root, async_op=a), [y] if rank == root else [])
        assert torch.equal(y, total if rank == root else x)
        y = x.clone()
        run(asynchronous, lambda a, y=y: dist.broadcast(y, root, async_op=a), [y] if rank != root else [])
        assert torch.equal(y, all_of[root])
        whole = x.new_empty(n * world_size)
        run(asynchronous, lambda a, y=whole, x=x: dist.all_gather_single(y, x, async_op=a), [whole])
        assert torch.equal(whole, torch.cat(all_of))
        outs = [torch.empty_like(made(r, n + r, dtype)) for r in ranks]
        mine = made(rank, n + rank, dtype)
        run(asynchronous, lambda a, y=outs, x=mine: dist.all_gather(y, x, async_op=a), outs)
        assert all(torch.equal(out, made(r, n + r, dtype)) for r, out in enumerate(outs))
        part = x.new_empty(n)
        terms = torch.cat([x + r for r in ranks])
        run(asynchronous, lambda a, y=part, x=terms: dist.reduce_scatter_single(y, x, async_op=a), [part])
        want = torch.stack([(each + rank).double() for each in all_of]).sum(0).to(dtype)
        assert torch.equal(part, want)
        uneven = [made(rank, n + r, dtype) for r in ranks]
        part = x.new_empty(n + rank)
        run(asynchronous, lambda a, y=part, x=uneven: dist.reduce_scatter(y, x, async_op=a), [part])
        assert torch.equal(part, torch.stack([made(r, n + rank, dtype).double() for r in ranks]).sum(0).to(dtype))
        outs = [torch.empty_like(x) for _ in ranks]
        run(
            asynchronous,
            lambda a, y=outs, x=x: dist.gather(x, y if rank == root else None, root, async_op=a),
            outs * (rank == root),
        )
        assert rank != root or all(torch.equal(out, each) for out, each in zip(outs, all_of))
        part, dealt = torch.empty_like(x), [made(r, n, dtype) for r in ranks]
        give = dealt if rank == root else None
        run(asynchronous, lambda a, y=part, x=give: dist.scatter(y, x, root, async_op=a), [part])
        assert torch.equal(part, x)
        sends, takes = [(rank + 2 * r) % 3 for r in ranks], [(r + 2 * rank) % 3 for r in ranks]
        rows, got = made(rank, 2 * sum(sends), dtype).view(-1, 2), x.new_empty(sum(takes), 2)
        run(
            asynchronous,
            lambda a, y=got, x=rows, t=takes, s=sends: dist.all_to_all_single(y, x, t, s, async_op=a),
            [got],
        )
        others = [made(r, 2 * sum((r + 2 * to) % 3 for to in ranks), dtype).view(-1, 2) for r in ranks]
        want = [other.split([(r + 2 * to) % 3 for to in ranks])[rank] for r, other in enumerate(others)]
        assert torch.equal(got, torch.cat(want))
        outs = [torch.empty_like(x) for _ in ranks]
        run(asynchronous, lambda a, y=outs, x=x: dist.all_to_all(y, [x + r for r in ranks], async_op=a), outs)
        assert all(torch.equal(out, each + rank) for out, each in zip(outs, all_of))
    run(asynchronous, lambda a: dist.barrier(async_op=a), [])


@distributed(world_size=[2, 3], backend="late")
def test_bools_complex_and_half_precision(rank: int, world_size: int) -> None:
    flags = torch.tensor([rank == 0, True, False])
    for op, want in (("MAX", [True, True, False]), ("MIN", [False, True, False])):
        y = flags.clone()
        dist.all_reduce(y, getattr(dist.ReduceOp, op))
        assert y.tolist() == want
    z = torch.complex(torch.ones(3), torch.full((3,), float(rank)))
    dist.all_reduce(z)
    assert z.tolist() == [complex(world_size, sum(range(world_size)))] * 3
    small = torch.ones(4).to(torch.float8_e4m3fn)
    whole = torch.empty(4 * world_size, dtype=torch.float8_e4m3fn)
    dist.all_gather_single(whole, small)
    assert whole.float().tolist() == [1.0] * 4 * world_size
    mean = torch.full((2,), float(rank))
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    assert mean.tolist() == [(world_size - 1) / 2] * 2


@distributed(world_size=[2, 3], backend="late")
def test_coalesced_and_in_place(rank: int, world_size: int) -> None:
    for asynchronous in (False, True):
        coalesced(rank, world_size, asynchronous)
    whole = torch.full((2 * world_size,), float(rank))  # a gather into the tensor that its input is a part of
    dist.all_gather_single(whole, whole[2 * rank : 2 * rank + 2], async_op=True).wait()
    assert whole.tolist() == [float(r) for r in range(world_size) for _ in range(2)]


def coalesced(rank: int, world_size: int, asynchronous: bool) -> None:
    xs = [torch.full((n,), float(rank)) for n in (3, 5)]
    wholes = [torch.empty(world_size * 3), torch.empty(world_size * 5)]
    spread = torch.full((2,), rank + 1.0)
    parts, terms = [torch.empty(2), torch.empty(1)], [torch.ones(2 * world_size), torch.ones(world_size)]
    calls = [
        (None, lambda: [dist.all_gather_single(y, each) for y, each in zip(wholes, xs)]),
        (None, lambda: [dist.reduce_scatter_single(y, each) for y, each in zip(parts, terms)]),
        (None, lambda: [dist.all_reduce(each) for each in xs]),
        (torch.device("cpu"), lambda: [dist.broadcast(spread, 0), dist.all_reduce(wholes[1][:2])]),
    ]
    for device, call in calls:
        with dist.distributed_c10d._coalescing_manager(device=device, async_ops=asynchronous) as held:
            call()
        if asynchronous:
            held.wait()
    total = sum(range(world_size))
    assert wholes[0].tolist() == [float(r) for r in range(world_size) for _ in range(3)]
    assert wholes[1][:2].tolist() == [0.0, 0.0]
    assert spread.tolist() == [1.0, 1.0]
    assert [part.tolist() for part in parts] == [[world_size] * 2, [world_size]]
    assert all(each.eq(total).all() for each in xs)


@distributed(world_size=[2, 3], backend="late")
def test_objects_and_subgroups(rank: int, world_size: int) -> None:
    found: list[object] = [None] * world_size
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": r} for r in range(world_size)]
    given: list[object] = [["from", rank]]
    dist.broadcast_object_list(given, world_size - 1)
    assert given == [["from", world_size - 1]]
    taken: list[object] = [None]
    dist.scatter_object_list(taken, [f"for {r}" for r in range(world_size)] if rank == 0 else None, 0)
    assert taken == [f"for {rank}"]
    pair = dist.new_group([0, world_size - 1])
    if rank in (0, world_size - 1):
        x = torch.tensor([float(rank)])
        dist.all_reduce(x, group=pair)
        assert x.item() == world_size - 1


@distributed(world_size=4, backend="late")
@pytest.mark.slow
def test_random_collectives_of_a_mesh(rank: int, world_size: int) -> None:
    """Collectives of random axes, many under way at a time, awaited in an order of each rank's own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    together, alone = random.Random(11), random.Random(rank)
    pending: list[tuple[dist.Work, Tensor, list[float]]] = []
    for step in range(120):
        axis = together.choice(("dp", "tp"))
        group, n = mesh.get_group(axis), together.choice((1, 17, 5000))
        peers = dist.get_process_group_ranks(group)
        x = torch.full((n,), float(rank + step))
        if together.random() < 0.5:
            work, out, want = dist.all_reduce(x, group=group, async_op=True), x, [sum(p + step for p in peers)] * n
        else:
            out = torch.empty(2 * n)
            work = dist.all_gather_single(out, x, group=group, async_op=True)
            want = [float(p + step) for p in peers for _ in range(n)]
        assert out.numel() == len(want)
        pending.append((work, out, want))
        while len(pending) > 5:
            done, got, expected = pending.pop(alone.randrange(len(pending)))
            done.wait()
            assert got.tolist() == expected
    for work, out, want in pending:
        work.wait()
        assert out.tolist() == want
