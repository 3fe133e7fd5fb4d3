"""Global states: one device's, bit for bit, from any mesh and into any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from plain import randn
from test_global_ops import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import shardgrad as sg
from shardgrad.nn.state import load_state_dict, state_dict
from shardgrad.testing import distributed

D = torch.float64


class Model(nn.Module):
    """Sharded, replicated and plain parameters, one of them with two names, and buffers."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        if mesh is None:
            self.embedding: nn.Module = nn.Embedding(11, 5, dtype=D)
            self.norm: nn.Module = nn.LayerNorm(5, dtype=D)
            self.up: nn.Module = nn.Linear(5, 7, dtype=D)
            self.down: nn.Module = nn.Linear(7, 2, dtype=D)
            self.head: nn.Module = nn.Linear(5, 11, bias=False, dtype=D)
        else:
            self.embedding = sg.VocabParallelEmbedding(11, 5, mesh=mesh, dtype=D)
            self.norm = sg.LayerNorm(5, mesh=mesh, dtype=D)
            self.up = sg.ColumnParallelLinear(5, 7, mesh=mesh, dtype=D)
            self.down = sg.RowParallelLinear(7, 2, mesh=mesh, dtype=D)
            self.head = sg.ColumnParallelLinear(5, 11, bias=False, mesh=mesh, dtype=D)
        self.head.weight = self.embedding.weight
        self.statistics = nn.BatchNorm1d(3, dtype=D)
        self.register_buffer("count", torch.tensor(4))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def filled(seed: int) -> Model:
    """One device's model with values that tell every element from every other."""
    model = Model(None)
    for at, tensor in enumerate([*model.parameters(), *model.buffers()]):
        with torch.no_grad():
            tensor.copy_(randn(*tensor.shape, seed=100 * seed + at) * 10)
    return model


def assert_same_state(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def meshes(world_size: int) -> list[DeviceMesh]:
    shapes = [(1, world_size), (world_size, 1)] + [(2, 2)] * (world_size == 4)
    return [init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")) for shape in shapes]


@distributed(world_size=[1, 2, 3, 4])
def test_there_and_back_on_every_mesh(world_size: int) -> None:
    expected = filled(1).state_dict()
    for mesh in meshes(world_size):
        model = Model(mesh)
        addresses = [p.data_ptr() for p in model.parameters()]
        with sg.trace_collectives() as traced:
            load_state_dict(model, expected)
        assert len(traced) == 0
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert_same_state(state_dict(model), expected)
        assert_same_state(state_dict(model, device="cpu"), expected)
        with sg.trace_collectives() as traced:
            state_dict(model)
        assert len(traced) == (4 if mesh.size(1) > 1 else 0)  # the table once, two weights, one bias


@distributed(world_size=4)
def test_from_one_rank_to_four_to_three(world_size: int) -> None:
    expected = filled(2).state_dict()
    one = Model(init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "tp"))["tp"])
    load_state_dict(one, expected)
    four = Model(init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)))
    load_state_dict(four, state_dict(one))
    state = state_dict(four)
    three = DeviceMesh("cpu", [0, 1, 2], mesh_dim_names=("tp",))
    if torch.distributed.get_rank() < 3:
        model = Model(three)
        load_state_dict(model, state)
        assert_same_state(state_dict(model), expected)
    assert_same_state(state, expected)


@distributed(world_size=[1, 2])
def test_a_state_is_a_snapshot(world_size: int) -> None:
    model = Model(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)))
    load_state_dict(model, filled(3).state_dict())
    state = state_dict(model)
    kept = copy.deepcopy(state)
    for tensor in [*model.parameters(), *model.buffers()]:
        with torch.no_grad():
            tensor.fill_(1)
    assert_same_state(state, kept)
    assert state["head.weight"] is state["embedding.weight"]
    assert not any(tensor.requires_grad for tensor in state.values())
    assert state._metadata["statistics"] == {"version": 2}  # type: ignore[attr-defined]


@distributed(world_size=[1, 2, 3, 4])
def test_dtensors_of_the_same_memory(world_size: int) -> None:
    for mesh in meshes(world_size):
        model = Model(mesh)
        load_state_dict(model, filled(4).state_dict())
        with sg.trace_collectives() as traced:
            state = state_dict(model, as_dtensor=True)
        assert len(traced) == 0
        expected = state_dict(model)
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            if not name.startswith(("statistics", "count")):
                assert isinstance(state[name], DTensor)
                assert torch.equal(state[name].full_tensor(), tensor), name
                assert state[name].shape == tensor.shape
                assert state[name].stride() == tensor.stride()
            else:
                assert type(state[name]) is torch.Tensor
                assert torch.equal(state[name], tensor)
        assert state["up.weight"].placements == (Replicate(), Shard(0))
        assert state["up.weight"].to_local().data_ptr() == model.up.weight.data_ptr()
        other = Model(mesh)
        with sg.trace_collectives() as traced:
            load_state_dict(other, state)  # the placements match: each rank copies its own
        assert len(traced) == 0
        assert_same_state(state_dict(other), expected)


@distributed(world_size=4)
def test_dtensors_of_another_mesh_and_of_other_placements(world_size: int) -> None:
    line, _, square = meshes(4)
    expected = filled(5).state_dict()
    first = Model(square)
    load_state_dict(first, expected)
    second = Model(line)
    load_state_dict(second, state_dict(first, as_dtensor=True))
    assert_same_state(state_dict(second), expected)
    swapped: dict[str, Any] = dict(state_dict(second, as_dtensor=True))
    swapped["up.weight"] = swapped["up.weight"].redistribute(placements=[Shard(1), Replicate()])
    swapped["count"] = DTensor.from_local(torch.tensor(9), line)
    load_state_dict(first, swapped)
    assert_same_state(state_dict(first), {**expected, "count": torch.tensor(9)})


@distributed(world_size=4)
def test_nested_cuts_are_dtensors_in_the_order_of_the_mesh(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for rows in (1, 2, 3, 5, 7, 8):
        full = randn(rows, 3, seed=rows)
        for cuts in (("dp/tp", ""), ("dp", "tp"), ("tp", "dp"), ("", "dp/tp")):
            table = Table(mesh, (rows, 3), *cuts)
            load_state_dict(table, {"weight": full})
            (found,) = state_dict(table, as_dtensor=True).values()
            assert torch.equal(found.full_tensor(), full), (rows, cuts)
            twin = Table(mesh, (rows, 3), *cuts)
            load_state_dict(twin, {"weight": found})
            assert torch.equal(twin.weight, table.weight)
    table = Table(mesh, (5, 3), "tp/dp", "")
    load_state_dict(table, {"weight": randn(5, 3, seed=0)})
    assert torch.equal(state_dict(table)["weight"], randn(5, 3, seed=0))
    with pytest.raises(sg.LayoutError, match=r"W\[a/tp/dp,b\]: a DTensor shards .* mesh's order \(dp, tp\)"):
        state_dict(table, as_dtensor=True)
    zeros = state_dict(Table(mesh, (5, 3), "dp", ""), as_dtensor=True)
    load_state_dict(table, zeros)  # what cannot be written as a DTensor can be read from one
    assert not state_dict(table)["weight"].any()
    flat = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "tp"))
    assert state_dict(Table(flat, (5, 3), "tp/dp", ""), as_dtensor=True)["weight"].placements == (Shard(0), Shard(0))


@distributed(world_size=4)
def test_distributed_checkpoints_move_between_meshes(world_size: int, tmp_path: Path) -> None:
    line, _, square = meshes(4)
    expected = filled(6).state_dict()
    first, second = Model(square), Model(line)
    load_state_dict(first, expected)
    dcp.save(dict(state_dict(first, as_dtensor=True)), checkpoint_id=tmp_path / "saved")
    dcp.load(dict(state_dict(second, as_dtensor=True)), checkpoint_id=tmp_path / "saved")  # into the model's memory
    assert_same_state(state_dict(second), expected)


@distributed(world_size=2)
def test_a_wrong_state_is_refused_whole_and_changes_nothing(world_size: int) -> None:
    model = Model(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    before = copy.deepcopy(model.state_dict())
    state = dict(filled(7).state_dict())
    del state["norm.bias"], state["count"]
    state["norm.gain"] = torch.ones(5)
    state["up.weight"] = state["up.weight"].T
    state["down.weight"] = model.down.weight.detach()
    state["down.bias"] = [1.0, 2.0]
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(ValueError) as caught:
        load_state_dict(model, state)
    assert str(caught.value).splitlines() == [
        "the state is not that of this Model, which has not been changed:",
        "  missing: count",
        "  missing: norm.bias",
        "  unknown: norm.gain",
        "  up.weight: global shape (7, 5) in the model, (5, 7) in the state",
        f"  down.weight: global shape (2, 7) in the model, (2, {model.down.weight.shape[1]}) in the state "
        "(this rank's shard: a state is global)",
        "  down.bias: a list, not a tensor",
        "  head.weight: shared with embedding.weight, but the state has other values there",
    ]
    assert_same_state(model.state_dict(), before)


@distributed(world_size=2)
def test_one_name_of_a_shared_parameter_is_enough(world_size: int) -> None:
    model = Model(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    for name in ("embedding.weight", "head.weight"):
        expected = filled(ord(name[0])).state_dict()
        load_state_dict(model, {key: value for key, value in expected.items() if key != name})
        assert_same_state(state_dict(model), expected)
    with pytest.raises(ValueError, match=r"missing: embedding.weight\n  missing: head.weight$"):
        load_state_dict(model, {key: value for key, value in expected.items() if value.shape != (11, 5)})


@distributed(world_size=2)
def test_extra_states_dtypes_and_hooks(world_size: int) -> None:
    class Counter(nn.Module):
        seen = 0

        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(self.seen)

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.seen = len(state)

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = nn.Sequential(sg.ColumnParallelLinear(3, 5, mesh=mesh), Counter())
    state = state_dict(model)
    assert list(state) == ["0.weight", "0.bias", "1._extra_state"]
    state["1._extra_state"] = torch.ones(4)
    state["0.weight"] = randn(5, 3, seed=0)
    load_state_dict(model, state)
    assert model.get_submodule("1").seen == 4
    assert torch.equal(state_dict(model)["0.weight"], randn(5, 3, seed=0).float())

    model.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({"0.weight": torch.ones(1)})
    )
    with pytest.raises(ValueError, match=r"0.weight is not in model.state_dict\(\) as the parameter it is"):
        state_dict(model)


@distributed(world_size=2)
def test_wrong_uses_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    meta = nn.Sequential(sg.ColumnParallelLinear(3, 5, mesh=mesh, device="meta"))
    for call in (lambda: state_dict(meta), lambda: load_state_dict(meta, {})):
        with pytest.raises(ValueError, match=r"0.weight is on the meta device and has no values"):
            call()
    with pytest.raises(ValueError, match="device is for global tensors"):
        state_dict(sg.ColumnParallelLinear(3, 5, mesh=mesh), as_dtensor=True, device="cpu")
    with pytest.raises(TypeError, match="expected a module, not OrderedDict"):
        state_dict(meta.state_dict())  # type: ignore[arg-type]
