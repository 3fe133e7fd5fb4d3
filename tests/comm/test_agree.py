"""Ranks that disagree, come late or never come: a clear error on every rank, within the timeout."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import shardgrad as sg
from shardgrad.comm import collectives, comparison, shim
from shardgrad.comm.agree import agree, share_first
from shardgrad.comm.mesh import view
from shardgrad.comm.shm import queue
from shardgrad.testing import distributed

COLUMN, ROW = "X[n,d] W[d,m/tp] -> Y[n,m/tp]", "X[n,d/tp] W[d/tp,m] -> Y[n,m]"
DATA = "X[n/tp,d] W[d,m]  -> Y[n/tp,m]"


@distributed(world_size=[2, 3])
def test_disagreements_are_named_on_every_rank(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rank = mesh.get_local_rank("tp")
    odd = rank == world_size - 1
    x, w = torch.ones(4, 5, requires_grad=True), torch.ones(5, 3)
    cases = [
        (lambda: sg.matmul(x, w, ROW if odd else COLUMN, mesh), ["layout X[n,d] W", "layout X[n,d/tp] W"]),
        (lambda: sg.matmul(torch.ones(6, 5) if odd else x, w, ROW, mesh), ["n = 4", "n = 6"]),
        (lambda: sg.matmul(*((x.double(), w.double()) if odd else (x, w)), ROW, mesh), ["float32", "float64"]),
        (lambda: sg.matmul(x, w.clone().requires_grad_(odd), DATA, mesh), ["gradients wanted of X, W"]),
        (lambda: sg.matmul(x, w, ROW, mesh, bias=torch.ones(3) if odd else None), ["with bias"]),
    ]
    for call, words in cases:
        with pytest.raises(sg.DisagreementError) as caught:
            call()
        text = str(caught.value)
        assert f"the ranks of axis 'tp' (ranks {', '.join(map(str, range(world_size)))}) disagree" in text
        assert f"rank {', '.join(map(str, range(world_size - 1)))}:" in text
        assert f"rank {world_size - 1}:" in text
        for word in words:
            assert word in text
    # The group is still in order.
    assert sg.matmul(x, w, COLUMN, mesh).shape == (4, 3)


@distributed(world_size=[2, 3])
def test_ranks_that_build_different_layers_are_told(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    odd = mesh.get_local_rank("tp") == 1
    with pytest.raises(sg.DisagreementError, match=r"a layer being built(.*\n)*.*global shape \(6, 4\)"):
        sg.ColumnParallelLinear(4, 6 if odd else 4, mesh=mesh)
    with pytest.raises(sg.DisagreementError, match=r"ColumnParallelLinear(.*\n)*.*RowParallelLinear"):
        (sg.RowParallelLinear if odd else sg.ColumnParallelLinear)(4, 4, mesh=mesh)


@distributed(world_size=2)
def test_shapes_that_agreed_once_are_compared_again_only_on_request(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    x, w = torch.ones(4, 5), torch.ones(5, 3)
    for rows in (4, 6):
        sg.matmul(torch.ones(rows, 5), w, ROW, mesh)
    with sg.trace_collectives() as traced:
        sg.matmul(x, w, ROW, mesh)
    assert [event.operation for event in traced] == ["all-reduce"]
    mine = torch.ones(4 + 2 * mesh.get_local_rank("tp"), 5)  # 4 and 6 rows: both seen before, never at once
    with sg.check_every_call(), pytest.raises(sg.DisagreementError, match="n = 6"):
        sg.matmul(mine, w, ROW, mesh)
    with sg.check_every_call(), sg.trace_collectives() as traced:
        y = sg.matmul(x.clone().requires_grad_(), w, ROW, mesh)
        y.sum().backward()
    assert [event.dtype for event in traced] == ["float32"]


@distributed(world_size=3, timeout=60)
@pytest.mark.slow
def test_a_rank_that_never_comes_ends_in_a_named_timeout(world_size: int) -> None:
    mesh = DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=3)), "cpu", mesh_dim_names=("tp",))
    x, w = torch.ones(4, 5), torch.ones(5, 3)
    sg.matmul(x, w, ROW, mesh)
    if mesh.get_local_rank("tp") == 2:
        time.sleep(10)
        return
    start = time.monotonic()
    with pytest.raises(sg.CollectiveError) as caught:
        sg.matmul(x, w, ROW, mesh)
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert f"rank {dist.get_rank()}: all-reduce of Y over axis 'tp' (ranks 0, 1, 2) failed" in text
    assert "rank 2 does not answer" in text
    assert f"rank {1 - dist.get_rank()} failed in: all-reduce of Y" in text


@pytest.mark.slow
@distributed(world_size=2, timeout=60)
def test_ranks_that_wait_in_different_operations_are_told_of_each_other(world_size: int) -> None:
    mesh = DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=3)), "cpu", mesh_dim_names=("tp",))
    x, w = torch.ones(4, 5), torch.ones(5, 3)
    sg.matmul(x, w, ROW, mesh)
    gathered = "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]"
    sg.matmul(x, w, gathered, mesh, sizes={"n": 8})
    rank = mesh.get_local_rank("tp")
    with pytest.raises(sg.CollectiveError) as caught:
        sg.matmul(x, w, gathered if rank else ROW, mesh, sizes={"n": 8} if rank else None)
    other = "all-gather of X" if rank == 0 else "all-reduce of Y"
    assert f"rank {1 - rank} failed in: {other}" in str(caught.value)


@distributed(world_size=2)
def test_a_layer_with_a_bias_on_one_rank_only_is_refused_when_built(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with pytest.raises(sg.DisagreementError, match=r"bias: B\[m/tp\]"):
        sg.ColumnParallelLinear(4, 4, bias=mesh.get_local_rank("tp") == 0, mesh=mesh)


@distributed(world_size=2)
def test_only_what_moves_is_compared(world_size: int) -> None:
    """A rank may compute alone what communicates nothing, and rows that only a local sum sees may differ."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    rank = mesh.get_local_rank("tp")
    w = torch.ones(5, 3)
    if rank == 0:
        with sg.trace_collectives() as traced, torch.no_grad():
            sg.matmul(torch.ones(4, 5), w, DATA, mesh)
        assert len(traced) == 0
    w.requires_grad_()
    x = torch.ones(2, 4 + rank, 5)  # each rank pads to its own longest sequence
    sg.matmul(x, w, "X[b/tp,s,d] W[d,m] -> Y[b/tp,s,m]", mesh).sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad, torch.full((5, 3), 2.0 * (4 + 5)))


@distributed(world_size=2)
def test_a_mesh_that_lists_its_ranks_out_of_order_is_refused(world_size: int) -> None:
    mesh = DeviceMesh("cpu", torch.tensor([1, 0]), mesh_dim_names=("tp",))
    with pytest.raises(sg.MeshError, match="out of order along axis 'tp'"):
        sg.ColumnParallelLinear(4, 4, mesh=mesh)


@distributed(world_size=2)
def test_an_output_that_one_rank_does_not_use_is_no_disagreement(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    x, w, v = (torch.ones(3, 3, requires_grad=True) for _ in range(3))
    layouts = "X[n,d] W[d,m/tp] -> Y[n,m/tp]", "X[n,d] V[d,m/tp] -> Z[n,m/tp]"
    with sg.check_every_call():
        y, z = sg.matmul(x, [(w, layouts[0]), (v, layouts[1])], mesh, sizes={"m": 6})
        (y.sum() if mesh.get_local_rank("tp") else y.sum() + z.sum()).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[9.0] * 3] * 3  # three terms of 3 columns each


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("backend", ["gloo", "shm"])
@pytest.mark.parametrize("difference", ["frozen", "no_grad", "shape"])
def test_ranks_that_come_to_differ_are_told_of_it_on_every_rank(
    world_size: int, backend: str, difference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "_SLICE", timedelta(seconds=0.2))
    monkeypatch.setattr(comparison, "SLICE_S", 0.2)
    monkeypatch.setattr(queue, "_LOOK_FURTHER_S", 0.2)
    group = dist.new_group(timeout=timedelta(seconds=15), backend=backend)
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    torch.manual_seed(0)
    sequence = None if difference == "shape" else 0
    up = sg.ColumnParallelLinear(4, 6, mesh=mesh, sequence_dim=sequence)
    down = sg.RowParallelLinear(6, 4, mesh=mesh, sequence_dim=sequence)
    differs = 0 if difference == "shape" else world_size - 1
    odd = mesh.get_local_rank("tp") == differs

    def step(rows: int, graph: bool) -> None:
        with torch.set_grad_enabled(graph):
            y = down(up(torch.ones(rows, 4, requires_grad=True))).sum()
        if graph:
            y.backward()

    for _ in range(2):
        step(3, True)
    if difference == "frozen":
        up.weight.requires_grad_(not odd)
    start = time.monotonic()
    with pytest.raises(sg.DisagreementError) as caught:
        step(5 if difference == "shape" and odd else 3, not (difference == "no_grad" and odd))
    assert time.monotonic() - start < 10
    assert f"rank {differs} compares what it has not seen before:" in str(caught.value)
    assert "has seen what it does before, and has begun: " in str(caught.value)


def test_a_rank_that_is_behind_is_not_taken_for_one_that_has_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(shim, "store", lambda: store)
    latest = {"at": 3, "begun": 7, "rank": 1, "what": "a product", "text": "n = 5"}
    store.set("shardgrad/compare/13/latest", json.dumps(latest))
    for begun, compared, passed in ((7, 2, False), (6, 2, False), (8, 3, False), (8, 2, True)):
        standing = SimpleNamespace(name="13", rank=0, begun=begun, compared=compared)
        found = comparison._passed_by(standing, "all-reduce of Y")  # type: ignore[arg-type]
        assert (found is not None) == passed, (begun, compared)
    assert found is not None
    assert "rank 1 compares what it has not seen before:\n    n = 5" in found[1]
    assert comparison._passed_by(standing, "another") == found  # type: ignore[arg-type]  # what was said first stands


@distributed(world_size=[2, 3])
def test_a_comparison_makes_no_tensor_and_runs_no_collective(world_size: int) -> None:
    """So no device is waited for, and no kernel of NCCL can meet one of another shape."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    seen = []

    class Heard(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    over = view(mesh)
    with Heard():
        agree(over, over.axis("tp"), lambda: "what all say", "a test")
        with sg.check_every_call():
            agree(over, over.axis("tp"), lambda: "what all say", "a test")
        assert share_first(over.axis("tp"), "what for", 7 + mesh.get_local_rank("tp"), "a test") == 7
        with pytest.raises(sg.DisagreementError):
            agree(over, over.axis("tp"), lambda: f"rank {mesh.get_local_rank('tp')}", "a test")
        assert seen == []
        torch.ones(2)
    assert seen  # it does hear
