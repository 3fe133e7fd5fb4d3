"""PyTorch's own parallel programs, and hand-written ones, are right on the late backend, and nothing is reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shardgrad.testing import distributed


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5)).double()


def batch(rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def loss(net: nn.Module, x: Tensor) -> Tensor:
    weights = torch.randn(5, generator=torch.Generator().manual_seed(50), dtype=torch.float64)
    out: Tensor = (net(x).sin() * weights).sum()
    return out


def averaged(ranks: int, steps: int = 1) -> nn.Sequential:
    """The model whose gradients are the ranks' averages."""
    whole = model()
    for step in range(steps):
        for rank in range(ranks):
            (loss(whole, batch(10 * step + rank)) / ranks).backward()
    return whole


@distributed(world_size=[1, 2, 3], backend="late")
@pytest.mark.parametrize("view", [False, True])
def test_ddp(rank: int, world_size: int, view: bool) -> None:
    # Small buckets, so that several all-reduces are under way at a time.
    net = DistributedDataParallel(model(), bucket_cap_mb=1e-4, gradient_as_bucket_view=view)
    for step in range(2):
        loss(net, batch(10 * step + rank)).backward()
    for a, b in zip(net.parameters(), averaged(world_size, 2).parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@distributed(world_size=[2, 3], backend="late")
def test_ddp_with_a_hook_that_chains_on_a_future(rank: int, world_size: int) -> None:
    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations with classes
        work = dist.all_reduce(bucket.buffer().div_(world_size), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    net = DistributedDataParallel(model(), bucket_cap_mb=1e-4)
    net.register_comm_hook(None, hook)
    loss(net, batch(rank)).backward()
    for a, b in zip(net.parameters(), averaged(world_size).parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@distributed(world_size=[2, 3], backend="late")
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2(rank: int, world_size: int, reshard: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    net, whole = model(), model()
    for layer in (net[0], net[2], net[4], net):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    steps = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (net, whole)]
    for i in range(2):
        loss(net, batch(10 * i + rank)).backward()
        for other in range(world_size):
            (loss(whole, batch(10 * i + other)) / world_size).backward()
        for step in steps:
            step.step()
            step.zero_grad()
    for a, b in zip(net.parameters(), whole.parameters()):
        assert isinstance(a, DTensor)
        torch.testing.assert_close(a.full_tensor(), b)


@distributed(world_size=4, backend="late")
@pytest.mark.slow
def test_hybrid_sharding_and_tensor_parallelism(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = model()
    parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    loss(net, batch(rank // 2)).backward()
    for a, b in zip(net.parameters(), averaged(2).parameters()):
        assert isinstance(a.grad, DTensor)
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)


@distributed(world_size=[2, 3], backend="late")
def test_dtensor(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    net, whole, x = model(), model(), batch(0)
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    loss(net, x).backward()
    loss(whole, x).backward()
    for a, b in zip(net.parameters(), whole.parameters()):
        assert a.grad is not None
        grad = a.grad.full_tensor() if isinstance(a.grad, DTensor) else a.grad
        torch.testing.assert_close(grad, b.grad)
    full = torch.arange(42.0).reshape(7, 6)
    rows = distribute_tensor(full, mesh, [Shard(0)])
    assert torch.equal(rows.redistribute(placements=[Shard(1)]).full_tensor(), full)
    term = DTensor.from_local(full * (rank + 1), mesh, [Partial()])
    ranks = world_size * (world_size + 1) // 2
    for placement in (Replicate(), Shard(0), Shard(1)):
        assert torch.equal(term.redistribute(placements=[placement]).full_tensor(), full * ranks)
    product = distribute_tensor(full, mesh, [Shard(1)]) @ distribute_tensor(full.t(), mesh, [Shard(0)])
    assert torch.equal(product.full_tensor(), full @ full.t())


@distributed(world_size=[2, 3], backend="late")
def test_functional_collectives(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    x = torch.arange(6.0) + rank
    total = torch.arange(6.0) * world_size + sum(range(world_size))
    assert torch.equal(functional.all_reduce(x, "sum", group) * 1, total)
    assert torch.equal(functional.wait_tensor(functional.broadcast(x, 1, group)), torch.arange(6.0) + 1)
    ops = torch.ops._c10d_functional
    whole = torch.cat([torch.arange(6.0) + r for r in range(world_size)])
    started = ops.all_gather_into_tensor(x, world_size, group.group_name)
    assert torch.equal(ops.wait_tensor(started), whole)
    pieces = torch.cat([x * r for r in range(world_size)])
    summed = ops.reduce_scatter_tensor(pieces, "sum", world_size, group.group_name)
    assert torch.equal(ops.wait_tensor(summed), total * rank)
    several = ops.all_reduce_coalesced([x, pieces], "sum", group.group_name)
    assert torch.equal(ops.wait_tensor(several[0]), total)
    assert torch.equal(ops.wait_tensor(several[1]), torch.cat([total * r for r in range(world_size)]))


class Column(torch.autograd.Function):
    """Megatron's column parallel linear layer: dX's all-reduce runs under dW's product."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        x, w = ctx.saved_tensors
        dx = dy @ w
        work = dist.all_reduce(dx, async_op=True)
        dw = dy.t() @ x
        work.wait()
        return dx, dw


class Rows(torch.autograd.Function):
    """Megatron's sequence parallel region: all-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        whole = x.new_empty(dist.get_world_size() * x.shape[0], x.shape[1])
        work = dist.all_gather_single(whole, x.contiguous(), async_op=True)
        work.wait()
        return whole

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        dx = dy.new_empty(dy.shape[0] // dist.get_world_size(), dy.shape[1])
        dist.reduce_scatter_single(dx, dy.contiguous())
        return dx


@distributed(world_size=[2, 3], backend="late")
def test_tensor_parallelism_by_hand(rank: int, world_size: int) -> None:
    d, m, n = 5, 4 * world_size, 3 * world_size
    torch.manual_seed(1)
    x, w, v, dy = (torch.randn(*shape, dtype=torch.float64) for shape in ((n, d), (m, d), (d, m), (n, d)))
    mine = [x.chunk(world_size)[rank], w.chunk(world_size)[rank], v.chunk(world_size, 1)[rank]]
    mine = [each.clone().requires_grad_() for each in mine]
    term = F.gelu(Column.apply(Rows.apply(mine[0]), mine[1])) @ mine[2].t()
    term.backward(dy)
    y = term.detach()
    dist.all_reduce(y)
    full = [each.requires_grad_() for each in (x, w, v)]
    want = F.gelu(x @ w.t()) @ v.t()
    want.backward(dy)
    torch.testing.assert_close(y, want.detach())
    # Column sums dX over the ranks, and Rows' reduce-scatter sums what is equal on all.
    torch.testing.assert_close(mine[0].grad, full[0].grad.chunk(world_size)[rank] * world_size)  # type: ignore[union-attr]
    torch.testing.assert_close(mine[1].grad, full[1].grad.chunk(world_size)[rank])  # type: ignore[union-attr]
    torch.testing.assert_close(mine[2].grad, full[2].grad.chunk(world_size, 1)[rank])  # type: ignore[union-attr]


@distributed(world_size=[2, 3, 4], backend="late")
def test_pipelines(rank: int, world_size: int) -> None:
    """A ring in one batch, and stages that send forward and backward again, each waited for late."""
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    mine, got = torch.full((3,), float(rank)), torch.empty(3)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, got, before)])
    for work in works:
        work.wait()
    assert got.tolist() == [before] * 3
    for number in range(3):
        x = torch.full((2, 2), float(number))
        if rank:
            dist.recv(x, rank - 1)
        x = x + 1
        if rank < world_size - 1:
            sent = dist.isend(x, rank + 1)
            back = torch.empty(2, 2)
            sent.wait()
            dist.recv(back, rank + 1)
            x = back * 2
        if rank:
            dist.send(x, rank - 1)
        else:
            assert x.tolist() == [[(number + world_size) * 2.0 ** (world_size - 1)] * 2] * 2


@distributed(world_size=[2, 3], backend="late")
def test_double_buffering(rank: int, world_size: int) -> None:
    """Two buffers in turn: each is given away again only when its work has been waited for."""
    buffers = [torch.empty(4) for _ in range(2)]
    works: list[dist.Work | None] = [None, None]
    total = torch.zeros(4)
    for step in range(5):
        at = step % 2
        if (work := works[at]) is not None:
            work.wait()
            total += buffers[at]
        buffers[at].fill_(step + rank)
        works[at] = dist.all_reduce(buffers[at], async_op=True)
    for at in (1, 0):
        work = works[at]
        assert work is not None
        work.wait()
        total += buffers[at]
    assert total.tolist() == [10 * world_size + 5 * sum(range(world_size))] * 4


def on_thread(call: Callable[[], object]) -> None:
    import threading

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@distributed(world_size=2, backend="late")
def test_backward_on_a_thread_of_its_own(rank: int, world_size: int) -> None:
    net = DistributedDataParallel(model(), bucket_cap_mb=1e-4)
    on_thread(lambda: loss(net, batch(rank)).backward())
    for a, b in zip(net.parameters(), averaged(2).parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@distributed(world_size=2, backend="late")
def test_views_beside_what_is_under_way(rank: int, world_size: int) -> None:
    """Parts of a tensor that a collective does not touch may be used, also by strides that step over it."""
    x = torch.arange(24.0).reshape(6, 4) + rank
    work = dist.all_reduce(x[1], async_op=True)
    assert x[::2].sum() == sum(range(4)) + sum(range(8, 12)) + sum(range(16, 20)) + 12 * rank
    x[2:].add_(1)
    assert x[0].tolist() == [rank, rank + 1, rank + 2, rank + 3]
    copied = x[3:].clone()
    work.wait()
    assert torch.equal(copied, x[3:])
    assert x[1].tolist() == [9, 11, 13, 15]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["late", pytest.param("shm", marks=pytest.mark.rare)])
@distributed(world_size=2)
def test_compiled_ddp(rank: int, backend: str) -> None:
    """torch.compile comes upon the group's methods as DDP calls them, and leaves them alone."""
    import shardgrad.comm.shm
    import shardgrad.testing.late  # noqa: F401  # the names of both

    net = DistributedDataParallel(model(), process_group=dist.new_group(backend=backend))
    warnings.simplefilter("ignore", DeprecationWarning)  # of what torch.compile imports
    compiled = torch.compile(net)
    for _ in range(2):
        net.zero_grad()
        loss(compiled, batch(rank)).backward()
    for a, b in zip(net.parameters(), averaged(2).parameters()):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
