"""Conv1d and Conv2d against torch's, on integers, where every sum is exact and must be equal."""

from __future__ import annotations

import pytest
import torch
from plain import whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.nn.conv import _LAYOUTS
from shardgrad.testing import distributed

D = torch.float64


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(D)


def cut(full: Tensor, spec: sg.TensorSpec, mesh: DeviceMesh, groups: int) -> Tensor:
    """torch's [b, channels, …] as a layer of so many groups has it: a group is a letter, then merged again."""
    if groups == 1:
        return sg.shard(full, spec, mesh)
    return sg.shard(full.unflatten(1, (groups, -1)), spec, mesh).flatten(1, 2)


def check(sharded: nn.Module, plain: nn.Module, x: Tensor, groups: int, shard_dim: str) -> None:
    """Y, dX, dW, db equal torch's, and states are interchangeable."""
    mesh, layout = sharded.mesh, sharded.layout
    state = {name: integers(*value.shape, seed=at) for at, (name, value) in enumerate(plain.state_dict().items())}
    plain.load_state_dict(state)
    sg.load_state_dict(sharded, state)
    for name, value in sg.state_dict(sharded).items():
        assert torch.equal(value, state[name])
    x.requires_grad_()
    expected = plain(x)
    dy = integers(*expected.shape, seed=9)
    expected.backward(dy)
    local = cut(x.detach(), layout["X"], mesh, groups).requires_grad_()
    sharded(local)  # ranks compare what they mean
    with sg.trace_collectives() as traced:
        y = sharded(local)
        y.backward(cut(dy, layout["Y"], mesh, groups))
    assert torch.equal(y, cut(expected.detach(), layout["Y"], mesh, groups))
    assert local.grad is not None
    assert x.grad is not None
    assert torch.equal(local.grad, cut(x.grad, layout["X"], mesh, groups))
    gradients = dict(plain.named_parameters())
    for name, parameter, sharding in sg.named_shardings(sharded):
        assert parameter.grad is not None
        assert sharding is not None
        right = gradients[name].grad
        assert right is not None
        assert torch.equal(whole(parameter.grad, sharding), right), name
    assert {event.operation for event in traced} == (
        {
            "out": {"all-reduce"},
            "in": {"all-reduce"},
            "groups": set(),
            "batch": {"all-reduce"},
            "sharded": {"all-gather", "reduce-scatter"},
        }[shard_dim]
        if mesh.size() > 1
        else set()
    )


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("shard_dim", _LAYOUTS)
def test_conv2d_equals_torchs(world_size: int, shard_dim: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for groups, inner, outer, settings in (
        (1, 5, 7, {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
        (3, 2, 5, {"stride": 2, "padding": 1}),
        (5, 1, 1, {"padding": 2, "bias": False}),  # depthwise
    ):
        if shard_dim == "groups" and groups == 1:
            continue
        arguments = (groups * inner, groups * outer, (3, 2))
        plain = nn.Conv2d(*arguments, groups=groups, dtype=D, **settings)
        sharded = sg.Conv2d(*arguments, groups=groups, mesh=mesh, shard_dim=shard_dim, dtype=D, **settings)
        assert repr(sharded).startswith(f"Conv2d({groups * inner}, {groups * outer}, kernel_size=(3, 2), stride=")
        check(sharded, plain, integers(3, groups * inner, 7, 6, seed=5), groups, shard_dim)


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("shard_dim", ["out", "in", "groups"])
def test_conv1d_equals_torchs(world_size: int, shard_dim: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    groups = 4 if shard_dim == "groups" else 1
    plain = nn.Conv1d(8, 12, 3, 2, 1, 2, groups, dtype=D)
    sharded = sg.Conv1d(8, 12, 3, 2, 1, 2, groups, mesh=mesh, shard_dim=shard_dim, dtype=D)
    check(sharded, plain, integers(2, 8, 11, seed=5), groups, shard_dim)


@distributed(world_size=[2, 3])
def test_a_depthwise_separable_block_reduces_once_each_way(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(1)
    block = nn.Sequential(
        sg.Conv2d(3, 7, 1, mesh=mesh, shard_dim="out"),
        nn.ReLU(inplace=True),
        sg.Conv2d(7, 7, 3, padding=1, groups=7, mesh=mesh, shard_dim="groups"),
        nn.ReLU(inplace=True),
        sg.Conv2d(7, 5, 1, mesh=mesh, shard_dim="in"),
    ).double()
    plain = nn.Sequential(
        nn.Conv2d(3, 7, 1), nn.ReLU(), nn.Conv2d(7, 7, 3, padding=1, groups=7), nn.ReLU(), nn.Conv2d(7, 5, 1)
    ).double()
    plain.load_state_dict(sg.state_dict(block))
    x = integers(2, 3, 5, 4, seed=1)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    block(mine)  # ranks compare what they mean
    with sg.trace_collectives() as traced:
        y = block(mine)
        y.square().sum().backward()
    assert [event.operation for event in traced] == ["all-reduce", "all-reduce"]
    expected = plain(theirs)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@distributed(world_size=[1, 2, 3])
def test_initial_values_are_of_torchs_size_and_the_same_on_every_mesh(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    states = []
    for shard_dim in ("groups", "out", "batch"):
        torch.manual_seed(4)
        states.append(sg.state_dict(sg.Conv2d(6, 9, (2, 3), groups=3, mesh=mesh, shard_dim=shard_dim)))
    for name in ("weight", "bias"):
        assert torch.equal(states[0][name], states[1][name])
        assert torch.equal(states[0][name], states[2][name])
    bound = (2 * 2 * 3) ** -0.5  # in-channels of a group, times the kernel
    assert 0.9 * bound < float(states[0]["weight"].abs().max()) <= bound
    assert states[0]["weight"].shape == (9, 2, 2, 3)


@distributed(world_size=2)
def test_states_as_dtensors_and_wrong_uses(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layer = sg.Conv2d(6, 9, 2, groups=3, mesh=mesh, shard_dim="groups")
    sg.load_state_dict(layer, sg.state_dict(layer, as_dtensor=True))
    with pytest.raises(ValueError, match=r"weight: global shape \(9, 2, 2, 2\) in the model, \(9, 3, 2, 2\)"):
        sg.load_state_dict(layer, {"weight": torch.ones(9, 3, 2, 2), "bias": torch.ones(9)})
    with pytest.raises(sg.ShapeError, match=r"leaves this rank [21] · 2 = [42] channels(.|\n)*shard x at the borders"):
        layer(torch.ones(1, 3, 4, 4))
    with pytest.raises(sg.ShapeError, match="groups=4 must divide in_channels=6"):
        sg.Conv2d(6, 8, 2, groups=4, mesh=mesh)
    with pytest.raises(sg.ShapeError, match="shard_dim is one of out, in, groups, batch, sharded, not 'rows'"):
        sg.Conv2d(6, 8, 2, mesh=mesh, shard_dim="rows")  # type: ignore[arg-type]
    with pytest.raises(sg.ShapeError, match="shard_dim='groups' of one group"):
        sg.Conv2d(6, 8, 2, mesh=mesh, shard_dim="groups")
    with pytest.raises(sg.ShapeError, match="kernel_size is a whole number of at least 1, or 2 of them"):
        sg.Conv2d(6, 8, (2, 2, 2), mesh=mesh)
