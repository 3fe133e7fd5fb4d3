"""Models of transformers sharded over one axis of a mesh, and their batch over another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_device import Float64, Heads, assert_same_gradients, backward, batch, loss_of, plain
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import shardgrad as sg
from shardgrad.testing import distributed


def square(world_size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))


def part(given: dict[str, Tensor], mesh: DeviceMesh, rows: int) -> dict[str, Tensor]:
    """This rank's rows of a batch: of three, two for the first rank and one for the second."""
    first = -(-rows // 2)
    mine = slice(0, first) if mesh.get_local_rank("dp") == 0 else slice(first, rows)
    return {name: one[mine] for name, one in given.items()}


def agree(name: str, world_size: int, heads: Heads, shard_params: bool, sequence: bool) -> None:
    mesh = square(world_size)
    one, model = plain(name, heads), plain(name, heads)
    sg.parallelize(model, mesh, data=sg.BatchAxis("dp", shard_params=shard_params), sequence=sequence)
    given = batch(name, rows=3)
    given["labels"][0, 2:] = -100  # the mean is over the tokens of all, of which ranks have other numbers
    for _ in range(2):
        right, found = backward(one, given), backward(model, part(given, mesh, 3))
        assert abs(found - right) <= 1e-12 * abs(right)
        assert_same_gradients(model, one)
    assert sg.num_parameters(model) == one.num_parameters()
    held = sum(parameter.numel() for parameter in model.parameters())
    if shard_params:
        assert held < 0.7 * one.num_parameters()
    expected = one.state_dict()
    for key, value in sg.state_dict(model).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("shard_params", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@distributed(world_size=2)
def test_uneven_batches(world_size: int, name: str, shard_params: bool) -> None:
    agree(name, world_size, (6, 3) if name == "qwen3" else (5, 5), shard_params, False)


@pytest.mark.slow
@pytest.mark.parametrize(("shard_params", "sequence"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["qwen3", "phi3", "olmo2", "qwen3_moe", "gpt2", "t5"])
@distributed(world_size=4, timeout=120)
def test_both_axes(world_size: int, name: str, shard_params: bool, sequence: bool) -> None:
    agree(name, world_size, (6, 3) if name not in ("gpt2", "t5") else (5, 5), shard_params, sequence)


def wrapped(model: Any, how: str, mesh: DeviceMesh) -> nn.Module:
    if how == "ddp":
        return DDP(model, process_group=mesh.get_group("dp"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def steps_agree(world_size: int, how: str, heads: Heads) -> None:
    """SGD, for which a gradient of another scale is another step."""
    mesh = square(world_size)
    one, model = plain("qwen3", heads), plain("qwen3", heads)
    sg.parallelize(model, mesh["tp"])
    outer = wrapped(model, how, mesh)
    given = batch("qwen3", rows=2)
    given = {"input_ids": given["input_ids"], "labels": given["input_ids"]}  # as many on each rank: means of means
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (one, outer)]
    for most in (1e6, 0.5):
        backward(one, given)
        outer.zero_grad()
        with Float64():
            loss_of(outer, part(given, mesh, 2)).backward()
        assert_same_gradients(outer, one)
        right = nn.utils.clip_grad_norm_(one.parameters(), most)
        assert abs(sg.clip_grad_norm_(outer, most) - right) <= 1e-10 * right
        for optimizer in optimizers:
            optimizer.step()
    expected = one.state_dict()
    found = {name.removeprefix("module."): value for name, value in sg.state_dict(outer).items()}
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@distributed(world_size=2)
def test_torch_data_parallelism(world_size: int, how: str) -> None:
    steps_agree(world_size, how, (6, 3))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("heads", [(6, 3), (2, 1), (4, 2)])
@distributed(world_size=4)
def test_torch_data_parallelism_beside_shards(world_size: int, heads: Heads, how: str) -> None:
    steps_agree(world_size, how, heads)


@distributed(world_size=2)
def test_ddp_over_ranks_that_are_no_replicas(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = plain("llama", (4, 2))
    sg.parallelize(model, mesh)
    with pytest.raises(sg.MeshError, match=r"DistributedDataParallel takes ranks 0, 1.*get_group"):
        DDP(model)
