"""Streams and the host on a GPU: torch refuses to wait for it in warm calls whose sizes are told; deferred gradients on
another stream; time by events. Skipped without CUDA.

Where two ranks are named, they are imagined (torch's `fake` backend): collectives move nothing, products run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from every_call import calls
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.comm import shim
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import view
from shardgrad.nn import philox
from shardgrad.nn.counter import bits32
from shardgrad.train.late import LateNumber

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture
def imagined_ranks() -> Iterator[None]:
    shim.join_imagined(0, 2)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()


@pytest.mark.usefixtures("imagined_ranks")
def test_the_host_goes_on() -> None:
    tp = DeviceMesh("cuda", [0, 1], mesh_dim_names=("tp",))
    dp_tp = [DeviceMesh("cuda", ranks, mesh_dim_names=("dp", "tp")) for ranks in ([[0, 1]], [[0], [1]])]
    waits = {}
    for name, make in calls(tp, dp_tp).items():
        if name.startswith("MoE"):  # whose counts come from the other rank
            continue
        torch.cuda.set_sync_debug_mode("default")
        with torch.device("cuda"):
            call = make()
            for mode in ("default", "default", "error"):
                x = torch.randn(4, 6, requires_grad=True)
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    call(x).sum().backward()
                except RuntimeError as error:
                    waits[name] = str(error)
    assert waits == {}


def test_moe_waits_once() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("ep",))
        layer = sg.MoE(6, 5, 4, mesh=mesh)
        x = torch.randn(12, 6, device="cuda", requires_grad=True)
        layer(x)[0].sum().backward()
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing") as seen:
            y, balance = layer(x)
        assert len(seen) == 1
        torch.cuda.set_sync_debug_mode("error")
        (y.sum() + balance).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()


def test_a_mask_is_made_on_the_device_with_the_bits_of_the_host() -> None:
    shape, starts, lengths = (3, 50, 70), (1, 7, 3), (2, 31, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = philox.below(2**30, 5 | 3 << 64, shape, starts, lengths, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), torch.from_numpy(bits32(5 | 3 << 64, shape, starts, lengths) < 2**30))


def test_a_number_is_read_late() -> None:
    x = torch.full((), 3.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        late = LateNumber(x)
        x.zero_()
        assert late.read() == 3.5  # waits for its copy alone
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weight_gradients_on_another_stream() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("tp",))
        layer = sg.ColumnParallelLinear(512, 768, mesh=mesh)
        side, x = torch.cuda.Stream(), torch.randn(4096, 512, device="cuda", requires_grad=True)
        layer(x).square().sum().backward()
        expected = [p.grad for p in layer.parameters()]
        for _ in range(20):
            layer.zero_grad()
            with sg.defer_weight_grads() as later:
                layer(x).square().sum().backward()
            with torch.cuda.stream(side):
                later.run()
            for _ in range(4):  # what would take memory that was given back too early
                torch.randn(4096, 768, device="cuda")
            torch.cuda.current_stream().wait_stream(side)
            for parameter, right in zip(layer.parameters(), expected):
                assert parameter.grad is not None
                assert right is not None
                assert torch.equal(parameter.grad, right)
    finally:
        dist.destroy_process_group()


def test_communication_is_timed_by_events() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("tp",))
        reduce = AllReduce(view(mesh).axis("tp"))
        x = torch.ones(2**24, device="cuda")
        with sg.comm_timer() as clock:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                reduce(x)
                reduce.wait(reduce.start(x))
            assert clock.seconds >= 0
            torch.cuda.set_sync_debug_mode("default")
        assert clock.count == 6
        assert 0 < clock.seconds < 10
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
