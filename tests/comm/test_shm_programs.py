"""PyTorch's own parallel programs, and shardgrad's, on the shm backend: they give what they give on gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardgrad as sg
from shardgrad.comm import shim
from shardgrad.comm.mesh import view
from shardgrad.testing import distributed


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 7))


def batch(rank: int) -> Tensor:
    return torch.randn(5, 20, generator=torch.Generator().manual_seed(rank))


def loss(net: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = net(x)
    weights = torch.randn(7, generator=torch.Generator().manual_seed(50))
    return (out.sin() * weights).sum()


def alike(a: Tensor, b: Tensor, world_size: int, terms: int) -> bool:
    """Equal for two ranks, whose sum has one order; else within the rounding of as many terms as there are ranks."""
    if world_size <= 2:
        return torch.equal(a, b)
    return bool(((a - b).abs() <= terms * torch.finfo(a.dtype).eps * 4 * (a.abs() + b.abs().max())).all())


@distributed(world_size=[1, 2, 3], backend="shm")
def test_ddp(rank: int, world_size: int) -> None:
    gloo = dist.new_group(backend="gloo")
    grads = []
    for group in (None, gloo):
        # Small buckets, so that several all-reduces are under way at a time.
        net = DistributedDataParallel(model(), process_group=group, bucket_cap_mb=1e-3)
        for _ in range(2):
            loss(net, batch(rank)).backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads):
        assert alike(a, b, world_size, world_size)
    whole = model()
    for r in range(world_size):
        (2 * loss(whole, batch(r)) / world_size).backward()
    for a, p in zip(grads[0], whole.parameters()):
        torch.testing.assert_close(a, p.grad)


@distributed(world_size=[2, 3], backend="shm")
def test_fsdp2(rank: int, world_size: int, tmp_path: Path) -> None:
    gloo_mesh = DeviceMesh.from_group(dist.new_group(backend="gloo"), "cpu", mesh_dim_names=("dp",))
    shm_mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    nets = []
    for mesh in (shm_mesh, gloo_mesh):
        net = model()
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh)
        step = torch.optim.SGD(net.parameters(), lr=0.1)
        for i in range(2):
            loss(net, batch(10 * i + rank)).backward()
            step.step()
            step.zero_grad()
        nets.append(net)
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        assert isinstance(a, DTensor)
        assert isinstance(b, DTensor)
        assert alike(a.full_tensor(), b.full_tensor(), world_size, 2 * world_size)
    saved = {name: value.clone() for name, value in nets[0].state_dict().items()}
    dcp.save({"net": nets[0].state_dict()}, checkpoint_id=tmp_path)
    with torch.no_grad():
        for p in nets[0].parameters():
            p.zero_()
    state = {"net": nets[0].state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    for name, value in state["net"].items():
        assert torch.equal(value.full_tensor(), saved[name].full_tensor())


@distributed(world_size=[2, 3, 4], backend="shm")
def test_dtensor_tensor_parallelism(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    net, whole, x = model(), model(), batch(0)
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    loss(net, x).backward()
    loss(whole, x).backward()
    for a, b in zip(net.parameters(), whole.parameters()):
        assert isinstance(a.grad, DTensor)
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)
    full = torch.arange(20.0).reshape(5, 4)
    cut = distribute_tensor(full, mesh, [Shard(0)])
    assert torch.equal(cut.redistribute(placements=[Shard(1)]).full_tensor(), full)


@distributed(world_size=4, backend="shm")
def test_subgroups_of_a_mesh(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=mesh.get_group("tp"))
    assert x.item() == {0: 1, 1: 1, 2: 5, 3: 5}[rank]
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=mesh.get_group("dp"))
    assert x.item() == {0: 2, 1: 4, 2: 2, 3: 4}[rank]
    assert dist.get_backend(mesh.get_group("dp")) == "shm"


@distributed(world_size=[2, 3], backend="shm")
def test_functional_collectives(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    x = torch.arange(6.0) + rank
    total = torch.arange(6.0) * world_size + sum(range(world_size))
    assert torch.equal(functional.wait_tensor(functional.all_reduce(x, "sum", group)), total)
    assert torch.equal(functional.wait_tensor(functional.broadcast(x, 1, group)), torch.arange(6.0) + 1)
    whole = torch.cat([torch.arange(6.0) + r for r in range(world_size)])
    ops = torch.ops._c10d_functional
    wait = ops.wait_tensor
    assert torch.equal(wait(ops.all_gather_into_tensor(x, world_size, group.group_name)), whole)
    pieces = torch.cat([x * r for r in range(world_size)])
    assert torch.equal(wait(ops.reduce_scatter_tensor(pieces, "sum", world_size, group.group_name)), total * rank)
    swapped = functional.all_to_all_single(pieces, None, None, group)
    want = torch.cat([(torch.arange(6.0) + r) * rank for r in range(world_size)])
    assert torch.equal(functional.wait_tensor(swapped), want)


@distributed(world_size=[2, 3], backend="shm")
def test_coalesced_calls(rank: int, world_size: int) -> None:
    manager = dist.distributed_c10d._coalescing_manager
    xs = [torch.full((n,), float(rank)) for n in (3, 100_000)]
    with manager():
        for x in xs:
            dist.all_reduce(x)
    assert all((x == sum(range(world_size))).all() for x in xs)
    outs = [torch.empty(world_size * 2) for _ in range(2)]
    with manager(async_ops=True) as together:
        for i, out in enumerate(outs):
            shim.all_gather_single(out, torch.tensor([rank, i + 10.0]))
    together.wait()
    for i, out in enumerate(outs):
        assert out.tolist() == [v for r in range(world_size) for v in (r, i + 10)]


@distributed(world_size=[2, 3], backend="shm")
def test_traces_see_the_same_as_on_gloo(rank: int, world_size: int) -> None:
    gloo = dist.new_group(backend="gloo")
    totals, counts = [], []
    for group in (None, gloo):
        x = torch.ones(4)
        with sg.trace_collectives() as trace, CommDebugMode() as debug:
            dist.all_reduce(x, group=group)
            shim.all_gather_single(torch.empty(4 * world_size), x, group=group)
            dist.all_gather([torch.empty(4) for _ in range(world_size)], x, group=group)
            shim.reduce_scatter_single(torch.empty(2), torch.ones(2 * world_size), group=group)
            dist.all_to_all_single(torch.empty(world_size), torch.ones(world_size), group=group)
            dist.broadcast(x, 0, group=group)
            dist.reduce(x, 0, group=group)
            dist.barrier(group=group)
        totals.append([(e.operation, e.bytes, e.shape, e.dtype, e.ranks) for e in trace])
        counts.append(dict(debug.get_comm_counts()))
    assert totals[0] == totals[1]
    assert len(totals[0]) == 7
    assert counts[0] == counts[1]
    x = torch.ones(4)
    with sg.trace_collectives() as trace:  # sizes that differ, which no backend that pretends could gather
        outs = [torch.empty(r + 1) for r in range(world_size)]
        dist.all_gather(outs, torch.full((rank + 1,), float(rank)))
    assert len(trace) == 1
    assert all((out == r).all() for r, out in enumerate(outs))


@distributed(world_size=[2, 3, 4], backend="shm")
def test_layers_of_shardgrad(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    block = nn.Sequential(
        sg.LayerNorm(10, mesh=mesh, sequence_dim=1),
        sg.ColumnParallelLinear(10, 25, mesh=mesh, sequence_dim=1),
        nn.GELU(),
        sg.RowParallelLinear(25, 10, mesh=mesh, sequence_dim=1),
    )
    whole = nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 25), nn.GELU(), nn.Linear(25, 10))
    whole.load_state_dict(sg.state_dict(block))
    full = torch.randn(2, 7, 10)
    axis = view(mesh).axis("tp")
    with sg.trace_collectives() as trace:
        y = block(full.chunk(axis.size, 1)[axis.index] if axis.index < len(full.chunk(axis.size, 1)) else full[:, :0])
        weights = torch.randn(2, 7, 10)
        mine = weights.chunk(axis.size, 1)
        (y * (mine[axis.index] if axis.index < len(mine) else weights[:, :0])).sum().backward()
    assert {event.axis for event in trace} == {"tp"}
    assert {"all-gather", "reduce-scatter"} <= {event.operation for event in trace}
    (whole(full) * weights).sum().backward()
    grads = {name: p.grad for name, p in whole.named_parameters()}
    for name, p in block.named_parameters():
        got, want = p.grad, grads[name]
        if got.shape != want.shape:  # a shard
            dim = next(d for d in range(want.dim()) if got.shape[d] != want.shape[d])
            want = want.chunk(axis.size, dim)[axis.index]
        torch.testing.assert_close(got, want)


@distributed(world_size=2, backend="shm")
def test_parameters_and_inference_tensors_can_be_sent(rank: int, world_size: int) -> None:
    leaf = torch.full((100_000,), float(rank), requires_grad=True)
    version = leaf._version
    dist.all_reduce(leaf)
    assert (leaf == 1).all()
    assert leaf._version == version  # as on other backends: not a change that autograd must know of
    with torch.inference_mode():
        x = torch.full((100_000,), float(rank))
        work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert (x == 1).all()
    y = torch.full((100_000,), float(rank))
    dist.all_reduce(y)
    assert (y == 1).all()
    with pytest.raises(RuntimeError, match="CPU tensors only"):
        dist.group.WORLD._get_backend(torch.device("cuda"))
