"""Every collective of the shm backend against what it must give, exactly: small integers in every dtype."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.shm.errors import ShmError
from shardgrad.comm.shm.reduce import reduction
from shardgrad.layout.tree import single, tree_sum
from shardgrad.testing import distributed

DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
# Nothing, one element, fewer than ranks, one round, several rounds with a last one that is not full.
SIZES = [0, 1, 3, 1000, 601_007]
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


def made(n: int, rank: int, dtype: torch.dtype = torch.float32, salt: int = 0) -> Tensor:
    """What a rank holds; every rank can make every rank's."""
    x = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(97 * salt + rank))
    return x.to(dtype) if dtype != torch.bool else x > 1


def scattered(x: Tensor) -> Tensor:
    """The same elements, not contiguous in memory."""
    wide = x.new_zeros(x.numel(), 3)
    wide[:, 1] = x
    return wide[:, 1]


def reduced(op: str, parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = OPS[op](total, part)
    return total


@distributed(world_size=[1, 2, 3, 4], backend="shm")
def test_all_reduce_of_every_dtype_operation_and_size(rank: int, world_size: int) -> None:
    for dtype in DTYPES:
        for op in OPS:
            real = dtype.is_floating_point or dtype.is_complex
            if (op[0] == "B" and real) or (dtype.is_complex and op != "SUM"):
                continue
            for n in SIZES if op == "SUM" else [5]:
                want = reduced(op, [made(n, r, dtype) for r in range(world_size)])
                for x in (made(n, rank, dtype), scattered(made(n, rank, dtype))):
                    dist.all_reduce(x, getattr(dist.ReduceOp, op))
                    assert torch.equal(x, want), (dtype, op, n)


@distributed(world_size=[2, 3, 4], backend="shm")
def test_average(rank: int, world_size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for n in (7, 301_007):
            x = made(n, rank, dtype)
            dist.all_reduce(x, dist.ReduceOp.AVG)
            total = reduced("SUM", [made(n, r, torch.float32) for r in range(world_size)])
            assert torch.equal(x, (total / world_size).to(dtype))
    with pytest.raises(ShmError, match=r"average of torch\.int64 is not"):
        dist.all_reduce(torch.ones(3, dtype=torch.int64), dist.ReduceOp.AVG)
    with pytest.raises(ShmError, match="bitwise and does not apply"):
        dist.all_reduce(torch.ones(3), dist.ReduceOp.BAND)
    dist.barrier()  # what every rank refuses by itself leaves the group whole


@distributed(world_size=[3, 4], backend="shm")
@pytest.mark.parametrize("n", [37, 301_007])
def test_sums_of_halves_are_rounded_once_and_alike_everywhere(rank: int, world_size: int, n: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        xs = [torch.randn(n, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world_size)]
        want = xs[0].float()
        for x in xs[1:]:
            want = want + x.float()
        y, whole = xs[rank].clone(), torch.empty(world_size * n, dtype=dtype)
        dist.all_reduce(y)
        assert torch.equal(y, want.to(dtype))
        shim.all_gather_single(whole, y)
        assert torch.equal(whole, y.repeat(world_size))
        pieces = torch.cat([x * (r + 1) for r in range(world_size) for x in [xs[rank]]])
        out = torch.empty(n, dtype=dtype)
        shim.reduce_scatter_single(out, pieces)
        want = (xs[0] * (rank + 1)).float()
        for x in xs[1:]:
            want = want + (x * (rank + 1)).float()
        assert torch.equal(out, want.to(dtype))


@distributed(world_size=[3, 4], backend="shm")
def test_sums_are_taken_in_a_tree_over_the_ranks_whatever_the_size(rank: int, world_size: int) -> None:
    for n in (1000, 301_007):  # one round and many: the same bits for the same elements
        xs = [torch.randn(n, generator=torch.Generator().manual_seed(r)) * 10.0 ** (r - 1) for r in range(world_size)]
        [want] = tree_sum(xs, single(0, world_size), world_size, torch.add)
        y = xs[rank].clone()
        dist.all_reduce(y)
        assert torch.equal(y, want)
        assert torch.equal(y, reduced("SUM", xs)) == (world_size == 3)


@pytest.mark.parametrize("count", range(1, 10))
def test_the_tree_of_a_reduction_is_that_of_layouts(count: int) -> None:
    by = reduction(dist.ReduceOp.SUM, torch.float32, count)
    for n in (50, 3):
        for at in range(-1, count):
            parts = [torch.randn(n, generator=torch.Generator().manual_seed(r)) * 10.0 ** (r % 3) for r in range(count)]
            [want] = tree_sum([part.clone() for part in parts], single(0, count), count, torch.add)
            out = parts[at] if at >= 0 else torch.empty(n)
            by.into(out, parts)
            assert torch.equal(out, want)


@distributed(world_size=[1, 2, 3, 4], backend="shm")
def test_every_other_collective(rank: int, world_size: int) -> None:
    everyone = range(world_size)
    cases = [(n, torch.float32) for n in SIZES] + [(33_075, dtype) for dtype in DTYPES]
    for number, (n, dtype) in enumerate(cases):
        root = number % world_size
        mine, whole = made(n, rank, dtype), torch.cat([made(n, r, dtype) for r in everyone])

        x = mine.clone()
        dist.broadcast(x, root)
        assert torch.equal(x, made(n, root, dtype))

        outs = [torch.empty(n, dtype=dtype) for _ in everyone]
        dist.all_gather(outs, scattered(mine))
        assert torch.equal(torch.cat(outs), whole)

        out = torch.empty(world_size * n, dtype=dtype)
        shim.all_gather_single(out, mine)
        assert torch.equal(out, whole)

        dist.gather(mine, outs if rank == root else None, root)
        assert torch.equal(torch.cat(outs), whole)

        x = torch.empty(n, dtype=dtype)
        dist.scatter(x, [made(n, r, dtype, salt=2) for r in everyone] if rank == root else None, root)
        assert torch.equal(x, made(n, rank, dtype, salt=2))

        outs = [torch.empty(n, dtype=dtype) for _ in everyone]
        dist.all_to_all(outs, [made(n, rank, dtype, salt=10 + r) for r in everyone])
        assert torch.equal(torch.cat(outs), torch.cat([made(n, r, dtype, salt=10 + rank) for r in everyone]))

        if dtype == torch.bool or dtype.is_complex:
            continue
        x = mine.clone()
        dist.reduce(x, root)
        want = reduced("SUM", [made(n, r, dtype) for r in everyone])
        assert torch.equal(x, want if rank == root else mine)

        out = torch.empty(n, dtype=dtype)
        shim.reduce_scatter_single(out, torch.cat([made(n, rank, dtype, salt=10 + r) for r in everyone]))
        assert torch.equal(out, reduced("SUM", [made(n, r, dtype, salt=10 + rank) for r in everyone]))


@distributed(world_size=[1, 2, 3, 4], backend="shm")
def test_shards_of_different_sizes(rank: int, world_size: int) -> None:
    everyone = range(world_size)
    for sizes in ([5, 0, 301_007, 2], [0, 1, 0, 140_000]):
        outs = [scattered(torch.empty(sizes[r])) for r in everyone]
        dist.all_gather(outs, made(sizes[rank], rank))
        assert all(torch.equal(outs[r], made(sizes[r], r)) for r in everyone)

        out = torch.empty(sizes[rank])
        dist.reduce_scatter(out, [made(sizes[r], rank, salt=r) for r in everyone])
        assert torch.equal(out, reduced("SUM", [made(sizes[rank], r, salt=rank) for r in everyone]))

        # Rank a sends (a + 2b) % 3 times many rows to rank b if b is odd, else none: some need more rounds.
        rows = [[(a + 2 * b) % 3 * (b % 2) * (sizes[2] // 3) for b in everyone] for a in everyone]
        sent = [
            torch.stack([made(rows[a][b], a, salt=b), made(rows[a][b], b, salt=a)], 1) for a in [rank] for b in everyone
        ]
        out = torch.empty(sum(rows[a][rank] for a in everyone), 2)
        dist.all_to_all_single(out, torch.cat(sent), [rows[a][rank] for a in everyone], rows[rank])
        want = [
            torch.stack([made(rows[a][rank], a, salt=rank), made(rows[a][rank], rank, salt=a)], 1) for a in everyone
        ]
        assert torch.equal(out, torch.cat(want))


@distributed(world_size=[2, 3], backend="shm")
def test_input_and_output_may_share_memory(rank: int, world_size: int) -> None:
    for n in (50, 200_003):
        whole = torch.cat([made(n, r) for r in range(world_size)])
        out = torch.full((world_size * n,), -1.0)
        out[rank * n : (rank + 1) * n] = made(n, rank)
        shim.all_gather_single(out, out[rank * n : (rank + 1) * n])
        assert torch.equal(out, whole)
        shim.reduce_scatter_single(out[rank * n : (rank + 1) * n], out)
        assert torch.equal(out[rank * n : (rank + 1) * n], made(n, rank) * world_size)


@distributed(world_size=[2, 4], backend="shm")
def test_messages_with_tags_in_any_order(rank: int, world_size: int) -> None:
    sizes = {0: 50_000, 1: 0, 2: 7}
    operations, wanted = [], []
    for other in range(world_size):
        if other != rank:
            for tag, n in sizes.items():
                operations.append(dist.P2POp(dist.isend, scattered(made(n, rank, salt=tag)), other, tag=tag))
            for tag in (2, 0, 1):
                x = scattered(torch.empty(sizes[tag]))
                wanted.append((x, made(sizes[tag], other, salt=tag)))
                operations.append(dist.P2POp(dist.irecv, x, other, tag=tag))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert all(torch.equal(x, want) for x, want in wanted)
    if rank:
        dist.send(torch.full((3,), float(rank)), 0, tag=9)
    else:
        x = torch.empty(3)
        came = [dist.recv(x, tag=9) for _ in range(world_size - 1) if x is not None]
        assert sorted(came) == list(range(1, world_size))
    # A message set aside while it is still coming, asked for before it has come as a whole.
    if rank == 0:
        large, small = dist.isend(made(300_000, 0), 1, tag=1), dist.isend(made(4, 0), 1, tag=2)
        large.wait()
        small.wait()
    elif rank == 1:
        x, y = torch.empty(4), torch.empty(300_000)
        second = dist.irecv(x, 0, tag=2)
        second.is_completed()
        first = dist.irecv(y, 0, tag=1)
        second.wait()
        first.wait()
        assert torch.equal(y, made(300_000, 0))
        assert torch.equal(x, made(4, 0))


@distributed(world_size=[2, 3, 4], backend="shm")
def test_asynchronous_work_may_be_awaited_in_any_order(rank: int, world_size: int) -> None:
    groups = [dist.new_group() for _ in range(3)]
    total = reduced("SUM", [made(150_000, r) for r in range(world_size)])
    tensors = [made(150_000, rank) for _ in range(6)]
    order = list(range(6)) if rank % 2 else [3, 4, 5, 0, 1, 2]  # in each group alike, between groups not
    works = {i: dist.all_reduce(tensors[i], group=groups[i // 2], async_op=True) for i in order}
    for i in reversed(order):
        works[i].wait()
        assert works[i].is_completed()
        assert works[i].is_success()
        assert torch.equal(tensors[i], total)
    x = made(9, rank)
    future = dist.all_reduce(x, async_op=True).get_future()
    doubled = future.then(lambda f: f.wait()[0] * 2)
    assert torch.equal(doubled.wait(), 2 * reduced("SUM", [made(9, r) for r in range(world_size)]))


@distributed(world_size=2, backend="shm")
def test_asynchronous_work_goes_on_while_nobody_waits(rank: int, world_size: int) -> None:
    """Rank 0 starts it and turns to something that only rank 1's wait brings about."""
    store = shim.store()
    x = made(3_000_000, rank)
    work = dist.all_reduce(x, async_op=True)
    if rank == 0:
        store.get("rank 1 has its sum")
    work.wait()
    if rank == 1:
        store.set("rank 1 has its sum", "yes")
    assert torch.equal(x, reduced("SUM", [made(3_000_000, r) for r in range(2)]))


@distributed(world_size=[2, 4], backend="shm")
def test_objects(rank: int, world_size: int) -> None:
    everyone: list[object] = [None] * world_size
    dist.all_gather_object(everyone, {"rank": rank, "long": "x" * 1000 * rank})
    assert everyone == [{"rank": r, "long": "x" * 1000 * r} for r in range(world_size)]
    said: list[object] = [("a", 1), None] if rank == 1 else [None, None]
    dist.broadcast_object_list(said, 1)
    assert said == [("a", 1), None]
    gathered: list[object] = [None] * world_size
    dist.gather_object(rank, gathered if rank == 0 else None, 0)
    assert rank or gathered == list(range(world_size))


@distributed(world_size=2, backend="shm")
def test_tensors_that_cannot_be_moved_are_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ShmError, match="dense CPU tensors"):
        dist.all_reduce(torch.ones(3, device="meta"))
    with pytest.raises(ShmError, match="input has 3 elements, its place in the output 4"):
        dist.all_gather([torch.empty(4), torch.empty(4)], torch.ones(3))
    with pytest.raises(ShmError, match="do not split dim 0"):
        dist.all_to_all_single(torch.empty(4), torch.empty(4), [2, 2], [1, 2])
    dist.barrier()


@distributed(world_size=4, backend="shm", timeout=90)
def test_random_collectives_on_subgroups_give_what_gloo_gives(rank: int, world_size: int) -> None:
    _stress(rank, world_size, 120)


@distributed(world_size=8, backend="shm", timeout=90)
def test_eight_ranks(rank: int, world_size: int) -> None:
    _stress(rank, world_size, 25)


def _stress(rank: int, world_size: int, count: int) -> None:
    """Collectives of random groups, sizes and dtypes, some asynchronous, on shm and on gloo."""
    together = random.Random(11)  # alike on all ranks
    members = [list(range(world_size)), [0, 1], list(range(1, world_size)), [r for r in range(world_size) if r % 2]]
    groups = [(ranks, dist.new_group(ranks), dist.new_group(ranks, backend="gloo")) for ranks in members]
    pending = []
    for step in range(count):
        ranks, shm, gloo = together.choice(groups)
        dtype = together.choice([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
        n, kind, later = together.choice([0, 1, 17, 5000, 200_003]), together.randrange(4), together.random() < 0.5
        root = together.choice(ranks)
        if rank not in ranks:
            continue
        x = made(n, rank, dtype, salt=step)
        results = []
        for group in (shm, gloo):
            y = x.clone()
            if kind == 0:
                work = dist.all_reduce(y, group=group, async_op=True)
            elif kind == 1:
                work = dist.broadcast(y, root, group=group, async_op=True)
            elif kind == 2:
                y = x.new_empty(len(ranks) * n)
                work = dist.all_gather(list(y.split(n)) if n else [y] * len(ranks), x, group=group, async_op=True)
            else:
                y = x.new_empty(n * len(ranks))
                work = dist.all_to_all_single(y, x.repeat(len(ranks)), group=group, async_op=True)
            results.append((work, y))
        results[1][0].wait()
        pending.append((results, kind, dtype, n))
        if not later:
            _compare(pending)
    _compare(pending)


def _compare(pending: list) -> None:
    while pending:
        results, *what = pending.pop()
        results[0][0].wait()
        assert torch.equal(results[0][1], results[1][1]), what
