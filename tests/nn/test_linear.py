"""Column and row parallel layers against nn.Linear."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain import assert_gradients_match, load_from, randn, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.nn import init
from shardgrad.testing import distributed

D = torch.float64


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("sequence_dim", [None, 0, 1, -2])
@pytest.mark.parametrize("bias", [True, False])
def test_column_then_row_equal_two_linears(world_size: int, sequence_dim: int | None, bias: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(3)
    up = sg.ColumnParallelLinear(7, 11, bias, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
    down = sg.RowParallelLinear(11, 6, bias, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
    plain_up = load_from(nn.Linear(7, 11, bias, dtype=D), up)
    plain_down = load_from(nn.Linear(11, 6, bias, dtype=D), down)
    x, dy = randn(3, 5, 7, seed=1), randn(3, 5, 6, seed=2)
    stored, out = up.layout(3)["X"], down.layout(3)["Y"]
    local = sg.shard(x, stored, mesh).requires_grad_()
    y = down(F.gelu(up(local)))
    y.backward(sg.shard(dy, out, mesh))
    x.requires_grad_()
    expected = plain_down(F.gelu(plain_up(x)))
    expected.backward(dy)
    torch.testing.assert_close(sg.unshard(y, out, mesh), expected.detach(), rtol=1e-12, atol=1e-12)
    assert local.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(sg.unshard(local.grad, stored, mesh), x.grad, rtol=1e-11, atol=1e-12)
    assert_gradients_match(up, plain_up)
    assert_gradients_match(down, plain_down)


@distributed(world_size=[2, 3])
def test_inputs_of_other_ranks_and_no_rows(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layer = sg.ColumnParallelLinear(5, 8, mesh=mesh, dtype=D)
    plain = load_from(nn.Linear(5, 8, dtype=D), layer)
    for shape in ((5,), (4, 5), (2, 3, 2, 5), (0, 5), (2, 0, 5), (2, 1, 2, 1, 5)):
        x = randn(*shape, seed=len(shape))
        y = layer(x)
        spec = layer.layout(len(shape))["Y"]
        torch.testing.assert_close(sg.unshard(y, spec, mesh), plain(x).detach(), rtol=1e-12, atol=1e-12)


@distributed(world_size=[1, 2, 4])
def test_more_ranks_than_features(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    up, down = sg.ColumnParallelLinear(3, 2, mesh=mesh, dtype=D), sg.RowParallelLinear(2, 3, mesh=mesh, dtype=D)
    plain_up, plain_down = load_from(nn.Linear(3, 2, dtype=D), up), load_from(nn.Linear(2, 3, dtype=D), down)
    x = randn(4, 3, seed=0)
    down(up(x)).backward(randn(4, 3, seed=1))
    plain_down(plain_up(x)).backward(randn(4, 3, seed=1))
    assert_gradients_match(up, plain_up)
    assert_gradients_match(down, plain_down)


@distributed(world_size=[1, 2, 3, 4])
def test_initial_values_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(11)
    seeds = [init.draw_seed() for _ in range(4)]
    torch.manual_seed(11)
    column = sg.ColumnParallelLinear(7, 9, mesh=mesh)
    row = sg.RowParallelLinear(9, 5, mesh=mesh)
    after = torch.randint(0, 2**31, ())
    for layer, fan_in in ((column, 7), (row, 9)):
        for _, parameter, sharding in sg.named_shardings(layer):
            full = whole(parameter, sharding)
            raw = np.random.Philox(key=seeds.pop(0)).random_raw(full.numel()) >> np.uint64(11)
            expected = ((raw + 0.5) * 2.0**-53 * 2 - 1) / np.sqrt(fan_in)
            np.testing.assert_allclose(full.flatten().numpy(), expected.astype(np.float32), rtol=1e-7, atol=1e-8)
    torch.manual_seed(11)
    torch.randint(0, 2**63 - 1, (4,))
    assert after == torch.randint(0, 2**31, ())  # torch's generator is where four draws leave it, on every rank
    bound = 7**-0.5  # of the global in_features
    assert float(whole(*next((p, s) for n, p, s in sg.named_shardings(column) if n == "weight")).abs().max()) <= bound
    again = sg.ColumnParallelLinear(7, 9, mesh=mesh)
    twice = [whole(layer.weight, layer.shardings()["weight"]) for layer in (again, column)]
    assert not torch.equal(*twice)  # another draw, other values


@distributed(world_size=[2, 4])
def test_shards_belong_together_however_the_ranks_were_seeded(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(100 + 7 * mesh.get_rank())
    layer = sg.ColumnParallelLinear(3, 5, mesh=mesh)
    torch.manual_seed(100 + 7 * 2 * mesh.get_local_rank("dp"))  # the first rank of this tp group
    seed = init.draw_seed()
    full = init.uniform(3**-0.5, seed, (5, 3), (0, 0), (5, 3)).float()
    assert torch.equal(layer.weight.detach(), sg.shard(full, layer.layout(2)["W"], mesh))


@distributed(world_size=2)
def test_torch_habits_work(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = nn.Sequential(sg.ColumnParallelLinear(4, 6, mesh=mesh), nn.GELU(), sg.RowParallelLinear(6, 4, mesh=mesh))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    y = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    assert twin[0].weight is not model[0].weight
    model.load_state_dict(twin.state_dict())
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert "in_features=4, out_features=6, bias=True, axis='tp'" in repr(model)
    assert model.to(D)(x.to(D)).dtype == D
    meta = sg.ColumnParallelLinear(4, 6, mesh=mesh, device="meta")
    assert meta.weight.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert meta(x).shape == (3, 3)
    named = {name: str(sharding.spec) for name, _, sharding in sg.named_shardings(model) if sharding}
    assert named == {
        "0.weight": "W[m/tp,d]",
        "0.bias": "B[m/tp]",
        "2.weight": "W[m,d/tp]",
        "2.bias": "B[m]",
    }


@distributed(world_size=2)
def test_a_sequence_that_is_told_is_not_exchanged_and_a_gathered_input_can_be_kept(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for save_gathered, told, expected in (
        ((), 5, ["all-gather", "all-gather", "reduce-scatter"]),
        (("X",), 5, ["all-gather", "reduce-scatter"]),
        ((), None, ["all-to-all", "all-gather", "all-gather", "reduce-scatter"]),
    ):
        layer = sg.ColumnParallelLinear(4, 6, mesh=mesh, sequence_dim=0, save_gathered=save_gathered)
        x = torch.ones(3 - mesh.get_local_rank("tp"), 4, requires_grad=True)
        layer(x, sequence_size=told).sum().backward()
        with sg.trace_collectives() as traced:
            layer(x, sequence_size=told).sum().backward()
        assert [event.operation for event in traced] == expected


@distributed(world_size=2)
def test_wrong_uses_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layer = sg.ColumnParallelLinear(4, 6, mesh=mesh)
    with pytest.raises(sg.ShapeError, match=r"its d is 5 here .*\n.*\n?.*d = 4 is given"):
        layer(torch.ones(3, 5))
    with pytest.raises(sg.ShapeError, match="d/tp is 4 here"):
        sg.RowParallelLinear(4, 6, mesh=mesh)(torch.ones(3, 4))  # given the whole input
    with pytest.raises(sg.ShapeError, match="in_features must be at least 1, not 0"):
        sg.ColumnParallelLinear(0, 6, mesh=mesh)
    with pytest.raises(sg.ShapeError, match="sequence_dim=1 of 2 dims is not a row dim"):
        sg.ColumnParallelLinear(4, 6, mesh=mesh, sequence_dim=1)(torch.ones(3, 4))
    with pytest.raises(sg.ShapeError, match="at least one dim"):
        layer(torch.tensor(1.0))
    with pytest.raises(sg.MeshError, match="no axis 'model' of RowParallelLinear: it has tp=2"):
        sg.RowParallelLinear(4, 6, mesh=mesh, axis="model")


class _Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@distributed(world_size=2)
def test_parametrized_parameters_are_used(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layer = sg.ColumnParallelLinear(3, 4, mesh=mesh)
    x = torch.randn(5, 3)
    once = layer(x).detach()
    for name in ("bias", "weight"):
        nn.utils.parametrize.register_parametrization(layer, name, _Doubled())
    assert torch.equal(layer(x), 2 * once)
