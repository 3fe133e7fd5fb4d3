"""Checkpoints: global tensors, the same from every mesh, loaded by any other."""

from __future__ import annotations

import json
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
from shardgrad.checkpoint import saving, seal
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
    for at, one in enumerate(meshes):
        folder = tmp_path / str(at)
        model, optimizer = trained(one)
        checkpoint.save(folder, model, optimizer, mesh=one, state={"step": 2})
        assert sorted(p.name for p in folder.iterdir()) == sorted(checkpoint.FILES)
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
            assert about["mesh"] == {"dp": one.size(0), "tp": one.size(1)}
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
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*once: it exists already"):
        checkpoint.save(tmp_path / "once", model, mesh=mesh)
    checkpoint.load(tmp_path / "once", model)


@distributed(world_size=[2], backend="shm")
def test_a_full_disk_leaves_nothing(world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model, _ = gpt(mesh)
    write = saving._write

    def on_a_full_disk(*arguments: Any) -> None:
        allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, allowed[1]))  # no file may be longer
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)

    monkeypatch.setattr(saving, "_write", on_a_full_disk)
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


class Fading(torch.nn.Module):
    """A layer of shardgrad beside buffers, of which one is no state."""

    def __init__(self, mesh: torch.distributed.DeviceMesh) -> None:
        super().__init__()
        self.layer = sg.ColumnParallelLinear(4, 6, mesh=mesh, gather_output=True)
        self.norm = torch.nn.BatchNorm1d(6)
        self.again = self.norm
        self.register_buffer("empty", torch.zeros(0, 2, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


@distributed(world_size=[2, 4], backend="shm")
def test_buffers_are_state(world_size: int, rank: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    model, other = Fading(mesh), Fading(mesh)
    model.norm(model.layer(torch.randn(8, 4, generator=torch.Generator().manual_seed(1))))
    model.scratch.fill_(1)
    checkpoint.save(tmp_path / "saved", model, mesh=mesh)
    checkpoint.load(tmp_path / "saved", other)
    assert int(other.norm.num_batches_tracked) == 1
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(other.norm, name), getattr(model.norm, name))
    assert not other.scratch.any()
    assert {name for name in load_file(tmp_path / "saved" / "model.safetensors") if "norm" in name} == {
        f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    model.scratch.fill_(rank)  # no state: may differ
    model.norm.running_mean[2] += rank == world_size - 1
    alike = ", ".join(map(str, range(world_size - 1)))
    with pytest.raises(
        ValueError, match=rf"the buffer norm.running_mean differs .*alike are ranks {alike}; ranks {world_size - 1}\)"
    ):
        checkpoint.save(tmp_path / "drifted", model, mesh=mesh)
    torch.distributed.barrier()
    assert not (tmp_path / "drifted").exists()
    own = type("Own", (torch.nn.Linear,), {"get_extra_state": lambda self: 3})
    with pytest.raises(ValueError, match=r"^0 \(Own\) has a state of its own \(get_extra_state\)"):
        checkpoint.save(tmp_path / "own", torch.nn.Sequential(own(2, 2)), mesh=mesh)


class Counting(torch.optim.SGD):
    """Keeps numbers of Python, and nothing for some parameters."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() > 1:
                    self.state[parameter] |= {
                        "count": self.state[parameter].get("count", 0) + 1,
                        "rate": 0.1,
                        "no": None,
                    }


@distributed(world_size=[2], backend="shm")
def test_what_an_optimizer_keeps_is_saved_or_refused(world_size: int, rank: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = sg.ColumnParallelLinear(4, 6, mesh=mesh)
    model(torch.ones(2, 4)).sum().backward()
    counting = Counting(model.parameters())
    counting.step()
    checkpoint.save(tmp_path / "numbers", model, counting, mesh=mesh)
    counting.step()
    counting.state[model.bias]["count"] = 9  # of later: the checkpoint has none
    checkpoint.load(tmp_path / "numbers", model, counting)
    assert counting.state[model.weight] == {"count": 1, "rate": 0.1}
    assert model.bias not in counting.state

    factored = torch.optim.Adafactor(model.parameters())
    factored.step()
    with pytest.raises(
        ValueError, match=r"Adafactor keeps 'row_var' of weight as a tensor of shape \(3, 1\), .*\(3, 4\)"
    ):
        checkpoint.save(tmp_path / "factored", model, factored, mesh=mesh)
    counting.state[model.weight]["count"] = rank
    with pytest.raises(ValueError, match="the optimizer's 'count' of weight differs between ranks"):
        checkpoint.save(tmp_path / "factored", model, counting, mesh=mesh)
    if rank == 1:  # seen by one rank alone
        counting.state[model.weight]["count"] = [1]
    with pytest.raises(ValueError, match="Counting keeps 'count' of weight as a list"):
        checkpoint.save(tmp_path / "factored", model, counting, mesh=mesh)
    with pytest.raises(ValueError, match="whether the optimizer has bias differs between ranks"):
        checkpoint.save(tmp_path / "factored", model, torch.optim.SGD([*model.parameters()][: 1 + rank]), mesh=mesh)
    stranger = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(
        ValueError, match=r"the optimizer has 1 of 3 parameters that the model has not, of shapes \(7,\)"
    ):
        checkpoint.save(tmp_path / "factored", model, torch.optim.SGD([*model.parameters(), stranger]), mesh=mesh)
    with pytest.raises(ValueError, match="state has mesh, which the checkpoint itself writes"):
        checkpoint.save(tmp_path / "factored", model, mesh=mesh, state={"mesh": 1, "step": 2})
    torch.distributed.barrier()
    assert not (tmp_path / "factored").exists()


@distributed(world_size=[2], backend="shm")
def test_another_optimizer_is_refused_and_nothing_changed(world_size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model, other = (sg.ColumnParallelLinear(4, 6, mesh=mesh) for _ in range(2))
    checkpoint.save(tmp_path / "none", model, mesh=mesh)
    checkpoint.save(tmp_path / "all", model, torch.optim.SGD(model.parameters()), mesh=mesh)  # before its first step
    checkpoint.save(tmp_path / "bias", model, torch.optim.SGD([model.bias]), mesh=mesh)
    before = other.weight.clone()
    some, every = torch.optim.SGD([other.weight]), torch.optim.SGD(other.parameters())
    for name, optimizer, told in (
        ("none", every, "none was saved without an optimizer's state, and SGD would begin anew"),
        ("all", torch.optim.AdamW(other.parameters()), "has the state of SGD, which AdamW does not go on with"),
        ("all", some, "of other parameters: it has bias, which this one does not hold"),
        ("bias", every, "of other parameters: it lacks weight. Make SGD of the parameters"),
        ("bias", some, "of other parameters: it lacks weight; it has bias, which"),
    ):
        with pytest.raises(ValueError, match=told):
            checkpoint.load(tmp_path / name, other, optimizer)
    assert torch.equal(other.weight, before)
    checkpoint.load(tmp_path / "bias", other, torch.optim.SGD([other.bias]))
    assert torch.equal(other.weight, model.weight)
    checkpoint.load(tmp_path / "none", other)


@distributed(world_size=[2], backend="shm")
def test_one_rank_reads_the_large_files_for_all(world_size: int, rank: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = sg.ColumnParallelLinear(4, 6, mesh=mesh)
    for name in ("one", "two"):
        checkpoint.save(tmp_path / name, model, mesh=mesh, state={"name": name})
    seal = checkpoint.verify(tmp_path / "one").seal
    torch.distributed.barrier()
    if rank == 0:
        file = tmp_path / "one" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    torch.distributed.barrier()
    assert checkpoint.load(tmp_path / "one", model, seal=seal)["name"] == "one"
    with pytest.raises(checkpoint.DamagedError, match=r"one/model.safetensors is not the file that was saved"):
        checkpoint.load(tmp_path / "one", model)
    with pytest.raises(checkpoint.DamagedError, match=r"two/SHA256SUMS is not the one that the first rank has read"):
        checkpoint.load(tmp_path / "two", model, seal=seal)


def test_the_digests_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seal is of the digests that the files were compared with, should another writer exchange them in between."""
    for name in (seal.MODEL, seal.OPTIMIZER):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / seal.STATE).write_text(json.dumps({"format": seal.FORMAT, "optimizer": None}))
    seal.write_sums(tmp_path)
    read, seen = seal._read, []
    monkeypatch.setattr(seal, "_read", lambda path: seen.append(path.name) or read(path))
    checkpoint.verify(tmp_path)
    assert sorted(seen) == sorted([seal.SUMS, seal.STATE])
