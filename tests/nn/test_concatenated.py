"""A parameter that concatenates parts sharded one by one, as query, key and value in one weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from plain import randn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import shardgrad as sg
from shardgrad import checkpoint
from shardgrad.layout.notation import parse_tensor
from shardgrad.nn.dtensors import whole
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.partial_grads import all_reduce_partial_grads_
from shardgrad.testing import distributed

D = torch.float64
QUERY, KEY, VALUE = (3, 2), (2, 2), (1, 2)  # heads and their features: 6, 4 and 2 rows
FEATURES = 5


class Fused(ShardedModule):
    """Queries in shards, keys and values on every rank, in one weight, by rows (dim 0) or by columns (dim 1)."""

    def __init__(self, mesh: DeviceMesh, dim: int = 0, marks: Sequence[str] = ("", "", "")) -> None:
        super().__init__(mesh, ["tp"])
        parts = []
        for (heads, features), axis, mark in zip((QUERY, KEY, VALUE), ("/tp", "", ""), marks):
            letters, sizes = [f"h{axis},k", "d"], [(heads, features), (FEATURES,)]
            spec = parse_tensor(f"W[{','.join(letters if dim == 0 else letters[::-1])}]{mark}")
            shape = tuple(size for group in (sizes if dim == 0 else sizes[::-1]) for size in group)
            merged = (heads * features, FEATURES) if dim == 0 else (FEATURES, heads * features)
            parts.append(sg.ParamSharding(spec, shape, mesh, merged))
        rows = sum(heads * features for heads, features in (QUERY, KEY, VALUE))
        shape = (rows, FEATURES) if dim == 0 else (FEATURES, rows)
        sharding = sg.ParamSharding(parse_tensor("W[m,d]"), shape, mesh, None, tuple(parts), dim)
        self._shardings["weight"] = sharding
        self.weight = nn.Parameter(torch.zeros(sharding.local_shape, dtype=D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def model_of(mesh: DeviceMesh, dim: int) -> nn.Module:
    return nn.Sequential(Fused(mesh, dim), sg.ColumnParallelLinear(5, 7, mesh=mesh, dtype=D), nn.Linear(3, 2, dtype=D))


def plain_of(model: nn.Module) -> nn.ParameterList:
    """One device's parameters and gradients; the model's are set to the same."""
    plain = nn.ParameterList()
    with torch.no_grad():
        for at, (_, parameter, sharding) in enumerate(sg.named_shardings(model)):
            shape = tuple(parameter.shape) if sharding is None else sharding.global_shape
            one = nn.Parameter(randn(*shape, seed=at))
            one.grad = randn(*shape, seed=50 + at)
            parameter.copy_(one if sharding is None else sharding.shard(one))
            parameter.grad = one.grad.clone() if sharding is None else sharding.shard(one.grad)
            plain.append(one)
    return plain


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_what_is_replicated_of_it_counts_once(world_size: int, dim: int, order: float) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = model_of(mesh, dim)
    plain = plain_of(model)
    assert sg.num_parameters(model) == sum(p.numel() for p in plain) == 12 * FEATURES + 42 + 8
    expected = nn.utils.clip_grad_norm_(plain, 0.3, order)
    sg.clip_grad_norm_(model, math.inf, order)  # compares the ranks
    with sg.trace_collectives() as traced:
        found = sg.clip_grad_norm_(model, 0.3, order)
    assert len(traced) == 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, (_, parameter, sharding) in zip(plain, sg.named_shardings(model)):
        assert one.grad is not None
        assert parameter.grad is not None
        full = parameter.grad if sharding is None else sharding.unshard(parameter.grad)
        torch.testing.assert_close(full, one.grad, rtol=1e-12, atol=1e-15)


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_states_and_checkpoints_hold_all_of_it(world_size: int, dim: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = model_of(mesh, dim)
    plain = plain_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    torch.optim.AdamW(plain.parameters()).step()
    state = sg.state_dict(model)
    for one, found in zip(plain, state.values()):
        torch.testing.assert_close(found, one.detach(), rtol=1e-12, atol=0)
    checkpoint.save(tmp_path / "saved", model, optimizer, mesh=mesh)
    for load in (lambda m: sg.load_state_dict(m, state), lambda m: checkpoint.load(tmp_path / "saved", m)):
        other = model_of(mesh, dim)
        load(other)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters()))
    parts = sg.state_dict(model, as_dtensor=True)
    assert {"0.weight.part0", "0.weight.part1"} <= set(parts)
    assert "0.weight" not in parts
    other = model_of(mesh, dim)
    sg.load_state_dict(other, parts)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters()))
    with torch.no_grad():
        parts["0.weight.part0"].to_local().zero_()  # of the model's own memory
    assert not torch.equal(model.get_parameter("0.weight"), other.get_parameter("0.weight"))


@distributed(world_size=[2, 3])
def test_of_its_replicas_those_that_come_apart_are_named(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = model_of(mesh, 0)
    plain_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    sg.check_replicas(model, optimizer)  # queries differ, as they should
    layer = model.get_submodule("0").get_parameter("weight")
    with torch.no_grad():
        layer[-1, 0] += mesh.get_rank()
    with pytest.raises(sg.VerificationError, match=r"value of 0.weight, part 2: over tp") as caught:
        sg.check_replicas(model, optimizer)
    assert "part 1" not in str(caught.value)
    assert "part 0" not in str(caught.value)


@distributed(world_size=2)
def test_partial_gradients_of_all_parts_or_of_none(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    layer = Fused(mesh, marks=["{dp}"] * 3)
    layer.weight.grad = torch.full_like(layer.weight, 1.0 + mesh.get_rank())
    all_reduce_partial_grads_(layer)
    assert bool((layer.weight.grad == 3).all())
    with pytest.raises(sg.LayoutError, match="weight concatenates parts whose gradients are left partial"):
        all_reduce_partial_grads_(Fused(mesh, marks=["{dp}", "", ""]))


@distributed(world_size=4)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("wrap", ["fsdp", "ddp"])
def test_under_data_parallelism(world_size: int, dim: int, wrap: str, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = Fused(mesh["tp"], dim)
    sharding = layer.shardings()["weight"]
    with pytest.raises(sg.MeshError, match=r"Fused.weight is sharded over axis 'tp'"):
        DDP(layer)
    plain = nn.Parameter(randn(*sharding.global_shape, seed=1))
    x = randn(4, 3, 12 if dim else FEATURES, seed=2)
    if wrap == "fsdp":
        model: nn.Module = fully_shard(nn.Sequential(layer), mesh=mesh["dp"])
    else:
        model = DDP(nn.Sequential(layer), process_group=mesh.get_group("dp"))
    name = "0.weight" if wrap == "fsdp" else "module.0.weight"
    sg.load_state_dict(model, {name: plain.detach()})
    assert sg.num_parameters(model) == plain.numel()
    here = slice(2 * mesh["dp"].get_local_rank(), 2 * mesh["dp"].get_local_rank() + 2)
    dy = randn(4, 3, FEATURES if dim else 12, seed=3)
    if dim == 0:  # columns of y by rows of the weight: those of this rank
        rows = sharding.shard(torch.arange(12.0).unsqueeze(1).expand(12, FEATURES))[:, 0].long()
        local_x, local_dy = x, dy[..., rows]
    else:
        columns = sharding.shard(torch.arange(12.0).expand(FEATURES, 12))[0].long()
        local_x, local_dy = x[..., columns], dy
    (2 * (model(local_x[here]) * local_dy[here]).sum()).backward()
    ((x @ plain.T) * dy).sum().backward()
    expected = nn.utils.clip_grad_norm_([plain], 0.5)
    found = sg.clip_grad_norm_(model, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    parameter = next(model.parameters())
    assert parameter.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(sharding.unshard(whole(parameter.grad)), plain.grad, rtol=1e-12, atol=1e-14)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    torch.optim.AdamW([plain]).step()
    torch.testing.assert_close(sg.state_dict(model)[name], plain.detach(), rtol=1e-9, atol=1e-9)
    sg.check_replicas(model, optimizer)
    checkpoint.save(tmp_path / "saved", model, optimizer, mesh=mesh)
    checkpoint.load(tmp_path / "saved", model, optimizer)
    torch.testing.assert_close(sg.state_dict(model)[name], plain.detach(), rtol=1e-9, atol=1e-9)
