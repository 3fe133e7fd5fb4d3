"""Checkpoints: global tensors, the same from every mesh, loaded by any other."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import whole
from safetensors.torch import load_file
from tiny import gpt, tokens
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad import checkpoint
from shardgrad.testing import distributed
from shardgrad.train.config import Train
from shardgrad.train.model import GPT
from shardgrad.train.optimizer import make_optimizer

TRAIN = Train(steps=2, batch=2, lr=0.01)


def trained(mesh: torch.distributed.DeviceMesh) -> tuple[GPT, torch.optim.Optimizer]:
    model, _ = gpt(mesh)
    optimizer = make_optimizer(model, TRAIN)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(*tokens()).backward()
        optimizer.step()
    return model, optimizer


def everything(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Global tensors of model and optimizer, by the names of the files' entries."""
    found = {}
    for name, parameter, sharding in sg.named_shardings(model):
        found[name] = whole(parameter, sharding)
        for key, value in optimizer.state[parameter].items():
            found[f"{name}/{key}"] = whole(value, sharding) if value.dim() else value
    return found


@distributed(world_size=[3, 4], backend="shm")
def test_saved_on_one_mesh_loaded_on_another(world_size: int, tmp_path: Path) -> None:
    """Every pair of meshes with 1, 2, 3 or 4 ranks along tp, and replicas along dp."""
    meshes = [
        init_device_mesh("cpu", (world_size // ranks, ranks), mesh_dim_names=("dp", "tp"))
        for ranks in range(1, world_size + 1)
        if world_size % ranks == 0
    ]
    for at, saving in enumerate(meshes):
        folder = tmp_path / str(at)
        model, optimizer = trained(saving)
        checkpoint.save(folder, model, optimizer, mesh=saving, state={"step": 2})
        assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
        files = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
        before = everything(model, optimizer)
        assert before.keys() == files.keys()
        assert len(files) == 4 * len(list(model.parameters()))
        for loading in meshes:
            fresh, _ = gpt(loading)
            for parameter in fresh.parameters():
                torch.nn.init.constant_(parameter, 9.0)
            other = make_optimizer(fresh, TRAIN)
            about = checkpoint.load(folder, fresh, other)
            assert about["step"] == 2
            assert about["mesh"] == {"dp": saving.size(0), "tp": saving.size(1)}
            for name, tensor in everything(fresh, other).items():
                assert tensor.dtype == files[name].dtype
                assert torch.equal(tensor, files[name]), name
                assert torch.equal(tensor, before[name]), name
        # Both go on alike: the last mesh's optimizer takes the same step from what was loaded.
        for some, its in ((model, optimizer), (fresh, other)):
            its.zero_grad()
            some.loss(*tokens()).backward()
            its.step()
        after = everything(fresh, other)
        for name, tensor in everything(model, optimizer).items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@distributed(world_size=[2], backend="shm")
def test_what_exists_is_not_overwritten(world_size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model, _ = gpt(mesh)
    checkpoint.save(tmp_path / "once", model, mesh=mesh)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*once: .*once exists already"):
        checkpoint.save(tmp_path / "once", model, mesh=mesh)
    checkpoint.load(tmp_path / "once", model)


@distributed(world_size=[2], backend="shm")
def test_a_full_disk_leaves_nothing(world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model, _ = gpt(mesh)
    write = checkpoint._write

    def on_a_full_disk(*arguments: Any) -> None:
        allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, allowed[1]))  # no file may be longer
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)

    monkeypatch.setattr(checkpoint, "_write", on_a_full_disk)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*File too large"):
        checkpoint.save(tmp_path / "full", model, mesh=mesh)
    torch.distributed.barrier()
    assert list(tmp_path.iterdir()) == []


@distributed(world_size=[2], backend="shm")
def test_another_model(world_size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    checkpoint.save(tmp_path / "saved", sg.ColumnParallelLinear(3, 5, mesh=mesh), mesh=mesh)
    with pytest.raises(ValueError, match=r"weight has global shape \(6, 3\) in this model, but \(5, 3\) in"):
        checkpoint.load(tmp_path / "saved", sg.ColumnParallelLinear(3, 6, mesh=mesh))
    with pytest.raises(ValueError, match=r"another model: it has bias, which the model lacks"):
        checkpoint.load(tmp_path / "saved", sg.ColumnParallelLinear(3, 5, bias=False, mesh=mesh))
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "nowhere", sg.ColumnParallelLinear(3, 5, mesh=mesh))


@distributed(world_size=[2], backend="shm")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_file_that_is_damaged_or_lost(world_size: int, rank: int, tmp_path: Path, name: str) -> None:
    model, optimizer = trained(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)))
    folder = tmp_path / "step-2"
    checkpoint.save(folder, model, optimizer, mesh=model.mesh)
    expected = rf"{name} cannot be read \(.+\): delete .*step-2 to go on from the checkpoint before it"
    for damage in (lambda path: os.truncate(path, path.stat().st_size - 1), Path.unlink):
        torch.distributed.barrier()
        if rank == 0:
            damage(folder / name)
        torch.distributed.barrier()
        with pytest.raises(OSError, match=expected):
            checkpoint.load(folder, model, optimizer)
