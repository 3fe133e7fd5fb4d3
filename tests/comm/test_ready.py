"""Collectives made ready once: the same whether they go straight to the backend or through PyTorch's dispatcher."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.comm import collectives, shim
from shardgrad.comm.mesh import view
from shardgrad.comm.shm import queue
from shardgrad.comm.timer import comm_timer
from shardgrad.layout.sizes import chunk
from shardgrad.testing import distributed


def whole(shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(salt)).to(dtype)


class Listener(shim.TorchDispatchMode):
    """Counts what the dispatcher hears of process groups."""

    heard = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.heard += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def check_all(world_size: int, *, listened: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    axis = view(mesh).axis("tp")
    listener, calls = Listener(), 0

    def listening() -> AbstractContextManager[object]:
        nonlocal calls
        calls += 1
        return listener if listened else nullcontext()

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.complex64):
        for shape in ((7, 3), (8, 2, 5), (1, 4)):
            terms = [whole(shape, dtype, rank) for rank in range(world_size)]
            total = sum(terms[1:], terms[0])
            reduce = collectives.AllReduce(axis)
            for _ in range(3):  # made ready once, called often
                x, y = terms[axis.index].clone(), terms[axis.index].clone()
                with listening():
                    x = reduce(x)
                with listening():
                    reduce.wait(reduce.start(y))
                assert torch.equal(x, total)
                assert torch.equal(y, total)
            for dim in range(len(shape)):
                mine = total.narrow(dim, *chunk(shape[dim], world_size, axis.index))
                gather = collectives.AllGather(axis, dim, shape[dim])
                scatter = collectives.ReduceScatter(axis, dim)
                for _ in range(2):
                    with listening():
                        gathered = gather(mine)
                    with listening():
                        kept = scatter(terms[axis.index])
                    assert torch.equal(gathered, total), (dtype, shape, dim)
                    assert torch.equal(kept, mine), (dtype, shape, dim)
                    gathered.add_(1)  # nobody else's memory
                    kept.add_(1)
    assert listener.heard == (calls if listened else 0)


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("listened", [False, True])
def test_on_gloo(world_size: int, listened: bool) -> None:
    check_all(world_size, listened=listened)


@distributed(world_size=[1, 2, 3, 4], backend="shm")
@pytest.mark.parametrize("listened", [False, True])
def test_on_shared_memory(world_size: int, listened: bool) -> None:
    check_all(world_size, listened=listened)


class Pretender(torch.Tensor):
    """A tensor that may not be what it seems: only the dispatcher knows."""


@distributed(world_size=2)
def test_who_is_asked(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend itself for plain tensors, also by the clock; the dispatcher for all others, and for who listens."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    axis = view(mesh).axis("tp")
    reduce = collectives.AllReduce(axis)
    gather, scatter = collectives.AllGather(axis, 0, 4), collectives.ReduceScatter(axis, 0)

    def check(x: Tensor) -> None:
        y = reduce(x.clone())
        assert y.tolist() == [2.0, 2.0]
        assert gather.wait(gather.start(x)).tolist() == [1.0] * 4
        assert scatter.wait(scatter.start(x)).tolist() == [2.0]

    one, strange = torch.ones(2), torch.ones(2).as_subclass(Pretender)
    for name in ("_via_dispatcher", "_direct"):
        with monkeypatch.context() as patch:
            for ready in (reduce, gather, scatter):
                patch.setattr(ready, name, None)
            if name == "_via_dispatcher":
                check(one)
                with comm_timer() as clock:
                    check(one)
                assert clock.count == 3
            else:
                with Listener():
                    check(one)
                check(strange)
            for ready in (reduce, gather, scatter):
                with pytest.raises(TypeError):
                    ready.start(strange if name == "_via_dispatcher" else one)


@distributed(world_size=[1, 2])
def test_values_that_memory_does_not_hold_as_they_are(world_size: int) -> None:
    """Negated and conjugated lazily: backends read memory."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    axis = view(mesh).axis("tp")
    negative = torch._neg_view(torch.tensor([1.0 + axis.index]))
    conjugate = torch.tensor([complex(1, 1 + axis.index)]).conj()
    assert negative.is_contiguous()
    assert negative.is_neg()
    gathered = collectives.AllGather(axis, 0, world_size)(negative)
    assert gathered.tolist() == [-1.0 - r for r in range(world_size)]
    gathered = collectives.AllGather(axis, 0, world_size)(conjugate)
    assert gathered.tolist() == [complex(1, -1 - r) for r in range(world_size)]
    total = collectives.AllReduce(axis)(negative.clone())
    assert total.tolist() == [-sum(1.0 + r for r in range(world_size))]


@distributed(world_size=2, backend="shm")
def test_a_destroyed_group_frees_its_memory_though_what_was_made_ready_lives(world_size: int) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("shardgrad-shm")

    gc.collect()  # of earlier tests' groups
    before = mapped()
    group = dist.new_group(backend="shm")
    assert mapped() == before + 1
    reducer = group.all_reducer(dist.ReduceOp.SUM)
    x = torch.ones(3)
    ticket = reducer.start([x], dist.AllreduceOptions())
    if ticket is not None:
        ticket.wait()
    assert x.tolist() == [2.0] * 3
    del ticket
    dist.barrier()
    dist.destroy_process_group(group)
    gc.collect()
    assert mapped() == before
    with pytest.raises(RuntimeError, match="was destroyed"):
        reducer.start([x], dist.AllreduceOptions())


@distributed(world_size=2, backend="shm")
def test_what_is_interrupted_after_it_was_published_is_not_forgotten(rank: int, world_size: int) -> None:
    """Else the next sum of this rank would meet this one of the others, unnoticed."""
    group = dist.new_group(backend="shm")
    reducer = group.all_reducer(dist.ReduceOp.SUM)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:

            def interrupted(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(queue, "Ticket", interrupted)
            with pytest.raises(KeyboardInterrupt):
                reducer.start([torch.ones(3)], dist.AllreduceOptions())
    dist.barrier()
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        reducer.start([torch.ones(3)], dist.AllreduceOptions())
    dist.barrier()


@distributed(world_size=[2, 3], backend="shm")
def test_ranks_whose_tensors_have_other_shapes_but_as_many_elements(rank: int, world_size: int) -> None:
    """As on gloo. What one rank has made ready for its shape is read by the others in theirs."""
    for turn in range(6):
        shape = [(3, 4), (12,), (2, 3, 2)][(rank + turn) % 3]
        x = whole((12,), torch.float32, rank + turn).view(shape)
        dist.all_reduce(x)
        assert torch.equal(x.view(-1), sum(whole((12,), torch.float32, r + turn) for r in range(world_size)))


@distributed(world_size=[2, 3], backend="shm")
def test_sums_begun_before_others_have_ended(rank: int, world_size: int) -> None:
    """Of one round, of many, by other operations, and of what is not contiguous: in the order in which they began."""
    for turn in range(4):
        small, large = whole((5, 3), torch.float32, rank), whole((300_007,), torch.float32, rank)
        apart = whole((4, 6), torch.float32, rank).t()
        greatest = whole((5, 3), torch.float32, rank + 9)
        tensors = [small, large, apart, greatest]
        if turn % 2:
            tensors.reverse()
        works = [
            dist.all_reduce(x, dist.ReduceOp.MAX if x is greatest else dist.ReduceOp.SUM, async_op=True)
            for x in tensors
        ]
        last = torch.full((2,), float(rank))
        dist.all_reduce(last)
        assert last.tolist() == [world_size * (world_size - 1) / 2] * 2
        for work in works if rank % 2 else works[::-1]:
            work.wait()
        ranks = range(world_size)
        assert torch.equal(small, sum(whole((5, 3), torch.float32, r) for r in ranks))
        assert torch.equal(large, sum(whole((300_007,), torch.float32, r) for r in ranks))
        assert torch.equal(apart, sum(whole((4, 6), torch.float32, r) for r in ranks).t())
        assert torch.equal(greatest, torch.stack([whole((5, 3), torch.float32, r + 9) for r in ranks]).amax(0))


@distributed(world_size=[2, 3], backend="shm")
def test_what_is_ready_for_a_shape_is_not_used_for_another_kind_of_tensor(rank: int, world_size: int) -> None:
    ranks = range(world_size)
    x = torch.full((2, 2), complex(1, rank))
    dist.all_reduce(x)
    assert x.tolist() == [[complex(world_size, sum(ranks))] * 2] * 2
    x = torch.full((2, 2), complex(1, rank)).conj()  # lazily
    dist.group.WORLD.allreduce([x]).wait()  # type: ignore[union-attr]  # torch's own function refuses it
    assert x.tolist() == [[complex(world_size, -sum(ranks))] * 2] * 2
    for dtype in (torch.float32, torch.bfloat16):
        for op, want in ((dist.ReduceOp.SUM, float(sum(ranks))), (dist.ReduceOp.AVG, (world_size - 1) / 2)):
            plain = torch.full((2, 2), float(rank), dtype=dtype)
            with torch.inference_mode():
                inference = plain.clone()
            apart = plain.repeat(2, 1)[::2]
            for x in (plain, inference, plain.clone().requires_grad_(), apart, inference):
                x.data.fill_(rank)
                dist.all_reduce(x, op)
                assert x.tolist() == [[want] * 2] * 2, (dtype, op)
    with pytest.raises(RuntimeError, match="dense"):
        dist.all_reduce(torch.eye(2).to_sparse())
    dist.barrier()
