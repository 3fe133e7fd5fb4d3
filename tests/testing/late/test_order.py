"""Orders of collectives that could deadlock, and ranks that do not call the same, are found and named."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist

from shardgrad.testing import distributed
from shardgrad.testing.late import DeadlockError, MismatchError, late_watch, stuck
from shardgrad.testing.late.findings import ledger
from shardgrad.testing.late.order import Key, Launch, inversions, unmatched

A, B, C = (Key(group, (0, 1), "0") for group in "abc")


def launch(*keys: Key) -> Launch:
    return Launch(keys, tuple(f"{key.group}{key.number}" for key in keys), "at here:1")


def orders(*ranks: list[Key | tuple[Key, ...]]) -> dict[int, list[Launch]]:
    return {rank: [launch(*(one if type(one) is tuple else (one,))) for one in each] for rank, each in enumerate(ranks)}


def test_one_order_on_all_ranks() -> None:
    assert inversions(orders([A, B, C], [A, B, C])) == []
    assert inversions(orders([A, B], [B, C], [A, C])) == []
    assert inversions(orders([(A, B), C], [(B, A), C])) == []
    assert inversions({}) == []


def test_two_ranks_in_opposite_orders() -> None:
    (text,) = inversions(orders([A, C, B], [B, A]))
    assert text.splitlines() == [
        "these orders could deadlock, as each rank starts what another one starts later:",
        "    rank 0: a0, at here:1",
        "        before b0, at here:1",
        "    rank 1: b0, at here:1",
        "        before a0, at here:1",
    ]


def test_a_batch_has_no_order_of_its_own() -> None:
    assert inversions(orders([(A, B)], [B, A])) == []
    assert len(inversions(orders([(A, B), C], [C, A]))) == 1


def test_a_circle_of_three() -> None:
    (text,) = inversions(orders([A, B], [B, C], [C, A]))
    assert [line.split(":")[0].strip() for line in text.splitlines() if "rank " in line][1:] == [
        "rank 0",
        "rank 1",
        "rank 2",
    ] or (text.count("before") == 3)
    assert text.count("before") == 3


def test_against_every_schedule_of_small_programs() -> None:
    """Two or three ranks with one queue each get stuck, whatever the sizes, exactly where a cycle is reported."""
    choose = random.Random(0)
    found = [0, 0]
    for _ in range(400):
        ranks = choose.choice((2, 3))
        keys = [Key("g", tuple(sorted(choose.sample(range(ranks), 2))), str(i)) for i in range(4)]
        programs = []
        for rank in range(ranks):
            mine = [key for key in keys if rank in key.ranks]
            choose.shuffle(mine)
            programs.append(mine)
        stuck = gets_stuck(programs)
        assert bool(inversions(orders(*programs))) == stuck, programs
        found[stuck] += 1
    assert min(found) > 50


def gets_stuck(programs: list[list[Key]]) -> bool:
    at = [0] * len(programs)
    moved = True
    while moved:
        moved = False
        for program, i in zip(programs, itertools.count()):
            if at[i] < len(program):
                key = program[at[i]]
                if all(at[r] < len(programs[r]) and programs[r][at[r]] == key for r in key.ranks):
                    for r in key.ranks:
                        at[r] += 1
                    moved = True
    return any(at[i] < len(program) for i, program in enumerate(programs))


def test_what_a_rank_never_calls() -> None:
    assert unmatched(orders([A, B], [A, B])) == []
    assert unmatched(orders([A, B], [A])) == [(0, "b0", "at here:1", [1])]


@distributed(world_size=[2, 3], backend="late")
def test_two_groups_in_opposite_orders(rank: int, world_size: int) -> None:
    """Asynchronous, so that gloo does both; on NCCL each rank's first kernel may wait for the other's second."""
    ranks = list(range(world_size))
    groups = [dist.new_group(ranks) for _ in range(2)]
    if rank == world_size - 1:
        groups.reverse()
    with late_watch(raises=False) as report:
        tensors = [torch.ones(3), torch.ones(4)]
        if rank == world_size - 1:
            tensors.reverse()
        works = [dist.all_reduce(x, group=group, async_op=True) for x, group in zip(tensors, groups)]
        for work in works:
            work.wait()
    assert {one.kind for one in report.findings} == {"order of ranks"}
    assert len(report.findings) == world_size - 1
    text = str(report.findings[-1])
    for part in (
        f"rank {world_size - 1}: all-reduce (SUM) of float32 [4] over",
        "before all-reduce (SUM) of float32 [3]",
    ):
        assert part in text
    assert text.count("test_order.py:") == 4


@distributed(world_size=[3], backend="late")
def test_a_ring_of_messages_without_a_batch(rank: int, world_size: int) -> None:
    with late_watch(raises=False) as report:
        got = torch.empty(2)
        works = [dist.isend(torch.ones(2), (rank + 1) % 3), dist.irecv(got, (rank - 1) % 3)]
        for work in works:
            assert work is not None
            work.wait()
    assert got.tolist() == [1, 1]
    assert [one.kind for one in report.findings] == ["order of ranks"]
    assert str(report).count("before") == 3
    assert "send of float32 [2] to rank 1" in str(report)


@distributed(world_size=[2, 3], backend="late")
def test_different_collectives(rank: int, world_size: int) -> None:
    """An all-gather on one rank and an all-reduce on the others: gloo hangs, or mixes their data."""
    x = torch.ones(3)
    gathered = torch.empty(3 * world_size)
    with pytest.raises(MismatchError) as caught:
        dist.all_gather_single(gathered, x) if rank == 1 else dist.all_reduce(x)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("call different collectives:")
    assert lines[1].startswith("  rank 0: all-reduce (SUM) of float32 [3], at ")
    assert lines[2].startswith("  rank 1: all-gather of float32 [3], at ")
    assert "in test_different_collectives: dist.all_gather_single(gathered, x) if" in lines[2]


@distributed(world_size=[2, 3], backend="late")
@pytest.mark.parametrize(
    ("first", "other"),
    [
        ((3, torch.float32), (4, torch.float32)),
        ((4, torch.float32), (4, torch.int32)),
        ((2, torch.float32), (1, torch.float64)),
    ],
)
def test_shapes_and_dtypes(
    rank: int, world_size: int, first: tuple[int, torch.dtype], other: tuple[int, torch.dtype]
) -> None:
    size, dtype = other if rank == world_size - 1 else first
    work = dist.all_reduce(torch.ones(size, dtype=dtype), async_op=True)
    with pytest.raises(MismatchError, match=rf"rank {world_size - 1}: all-reduce .* \[{other[0]}\], at "):
        work.wait()


@distributed(world_size=[2, 3], backend="late")
def test_roots_and_operations(rank: int, world_size: int) -> None:
    group = dist.new_group()
    with pytest.raises(MismatchError, match=r"broadcast from 0 of .*\n.*broadcast from 1 of "):
        dist.broadcast(torch.ones(3), min(rank, 1), group=group)
    with pytest.raises(MismatchError, match=r"\(SUM\) of .*\n.*\(MAX\) of "):
        dist.all_reduce(torch.ones(3), dist.ReduceOp.MAX if rank else dist.ReduceOp.SUM)


@distributed(world_size=[2, 3], backend="late")
def test_splits_of_an_all_to_all(rank: int, world_size: int) -> None:
    """The last rank sends one row more to rank 0 than that one takes."""
    sends = [1] * world_size
    if rank == world_size - 1:
        sends[0] = 2
    with pytest.raises(MismatchError, match=f"rank {world_size - 1} sends 16 bytes to rank 0, which takes 8\n"):
        dist.all_to_all_single(torch.empty(world_size, 2), torch.ones(sum(sends), 2), [1] * world_size, sends)


@distributed(world_size=[2, 3], backend="late")
def test_messages_of_another_size(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.send(torch.ones(3), 1)
    elif rank == 1:
        with pytest.raises(
            MismatchError, match=r"recv of float32 \[2\] from rank 0 awaits .*\[2\], and .*\[3\] was sent\n"
        ):
            dist.recv(torch.empty(2), 0)


@distributed(world_size=2, backend="late")
def test_messages_are_matched_by_order_as_nccl_does(rank: int) -> None:
    """Two messages with two tags, awaited the other way round: gloo goes by the tag."""

    def sent() -> int:
        return sum(count for of, count in ledger.counts.items() if of[1:] == (0, 1))

    before = sent()
    with late_watch(raises=False) as report:
        if rank == 0:
            for tag in (1, 2):
                dist.send(torch.full((2,), float(tag)), 1, tag=tag)
            assert sent() - before == 2
        else:
            x = torch.empty(2)
            dist.recv(x, 0, tag=2)
            assert x.tolist() == [1, 1]
            dist.recv(x, 0, tag=1)
    assert [one.kind for one in report.findings] == ["refused by NCCL"] * (2 * rank)


@distributed(world_size=[2, 3], backend="late")
def test_a_collective_that_one_rank_never_calls(rank: int, world_size: int) -> None:
    group = dist.new_group()
    with late_watch(raises=False) as report:
        works = [dist.all_reduce(torch.ones(2), group=group, async_op=True)] if rank == 0 else []
        del works
    absent = ", ".join(map(str, range(1, world_size)))
    assert any(
        one.kind == "never called" and one.what.endswith(f"which rank {absent} never did") for one in report.findings
    )


@distributed(world_size=2, backend="late")
@pytest.mark.parametrize("strided", ["all-reduce", "all-gather", "reduce-scatter", "broadcast", "all-to-all", "send"])
def test_what_is_not_contiguous(rank: int, world_size: int, strided: str) -> None:
    x, whole = torch.ones(4, 6).t(), torch.empty(12, 4)
    calls = {
        "all-reduce": lambda: dist.all_reduce(x),
        "all-gather": lambda: dist.all_gather_single(whole, x),
        "reduce-scatter": lambda: dist.reduce_scatter_single(torch.empty(3, 4), x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "all-to-all": lambda: dist.all_to_all_single(torch.empty(6, 4), x),
        "send": lambda: dist.send(x, 1 - rank),
    }
    with pytest.raises(
        ValueError, match=r"Tensors must be contiguous \(.*\[6, 4\], strides \[1, 6\]\), as NCCL says; at .*test_order"
    ):
        calls[strided]()


@distributed(world_size=2, backend="late")
def test_what_else_nccl_refuses(rank: int, world_size: int) -> None:
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="Unconvertible NCCL type"):
        dist.all_reduce(ones.short())
    with pytest.raises(ValueError, match=r"Cannot use ReduceOp\.BXOR with NCCL"):
        dist.all_reduce(ones.int(), dist.ReduceOp.BXOR)
    with pytest.raises(ValueError, match="must be equal to world_size times"):
        dist.distributed_c10d._get_default_group()._allgather_base(torch.empty(5), ones)
    with pytest.raises(ValueError, match="tensors must have the same type"):
        dist.distributed_c10d._get_default_group()._allgather_base(torch.empty(4).int(), ones)
    with pytest.raises(NotImplementedError, match="recvAnysource"):
        dist.recv(ones)
    dist.all_reduce(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))  # contiguous in its own way


def waits(text: str, group: str, ranks: list[int], number: int, **counts: int) -> dict[str, object]:
    return {"text": text, "of": group, "ranks": ranks, "number": number, "counts": counts}


def test_circles_of_ranks_that_wait() -> None:
    first = waits("A", "a", [0, 1], 0, a=1, b=0)
    assert stuck.circle({0: first}, 0) == ""  # rank 1 runs
    assert stuck.circle({0: first, 1: waits("B", "b", [1, 2], 0, a=0, b=1)}, 0) == ""  # rank 2 runs
    assert stuck.circle({0: first, 1: waits("A", "a", [0, 1], 0, a=1, b=0)}, 0) == ""  # both have come
    assert stuck.circle({0: first, 1: waits("B", "b", [0, 1], 0, a=0, b=1)}, 0).splitlines() == [
        "ranks wait for each other:",
        "  rank 0 waits in A",
        "  rank 1 waits in B",
        "  for rank 0, which is above",
    ]
    ended = {"ended": True, "counts": {"a": 0}}
    assert stuck.circle({0: first, 1: ended}, 0).endswith("for rank 1, which has ended the block")
    assert stuck.circle({0: first, 1: {**ended, "counts": {"a": 1}}}, 0) == ""  # it has come, and waited for nothing
    third = {1: waits("B", "b", [1, 2], 0, a=0, b=1), 2: waits("C", "c", [0, 2], 4, b=0, c=5)}
    assert stuck.circle({0: waits("A", "a", [0, 1], 0, a=1, c=4), **third}, 0).count("waits in") == 3


@pytest.mark.slow
@distributed(world_size=3, backend="late")
def test_ranks_that_wait_for_each_other_do_not_hang(rank: int, world_size: int) -> None:
    groups = [dist.new_group() for _ in range(2)]
    x, group = torch.ones(2), groups[min(rank, 1)]
    awaited = pytest.raises(DeadlockError, match=r"rank . waits in all-reduce .* started at .*test_order\.py")
    with late_watch(raises=False) as report, awaited:
        dist.all_reduce(x, group=group)
    assert {one.kind for one in report.findings} == {"never called"}


@pytest.mark.slow
@distributed(world_size=2, backend="late")
def test_a_rank_that_waits_for_one_that_has_ended_does_not_hang(rank: int, world_size: int) -> None:
    with late_watch(raises=False) as report:
        if rank == 0:
            with pytest.raises(DeadlockError, match=r"for rank 1, which has ended the block"):
                dist.barrier()
    assert {one.kind for one in report.findings} == {"never called"}


@pytest.mark.slow
@distributed(world_size=3, backend="late")
def test_messages_that_are_awaited_in_vain_do_not_hang(rank: int, world_size: int) -> None:
    """All ranks of a ring receive before they send."""
    x, group = torch.ones(2), dist.new_group()
    circle = pytest.raises(
        DeadlockError, match=r"rank . waits in recv of float32 \[2\] from rank .* at .*test_order\.py"
    )
    with late_watch(raises=False), circle:
        dist.recv(x, (rank - 1) % world_size, group=group)
    with late_watch(raises=False):
        if rank == 0:  # what has been sent arrives, though its rank has ended the block; another one never comes
            dist.recv(x, 1)
            with pytest.raises(DeadlockError, match=r"for rank 1, which has ended the block"):
                dist.recv(x, 1)
        elif rank == 1:
            dist.send(x, 0)
