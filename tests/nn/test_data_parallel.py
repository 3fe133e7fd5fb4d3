"""torch's data parallelism beside shardgrad's layers, over an axis of its own: FSDP2 and DDP against one device."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plain import randn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import shardgrad as sg
from shardgrad import checkpoint
from shardgrad.testing import distributed

D = torch.float64
Wrap = Callable[[nn.Module, DeviceMesh], nn.Module]


class Model(nn.Module):
    """Sharded, replicated and plain parameters of odd sizes, one of them with an empty shard."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        if mesh is None:
            self.embedding: nn.Module = nn.Embedding(11, 5, dtype=D)
            self.norm: nn.Module = nn.LayerNorm(5, dtype=D)
            self.up: nn.Module = nn.Linear(5, 7, dtype=D)
            self.down: nn.Module = nn.Linear(7, 5, dtype=D)
            self.one: nn.Module = nn.Linear(5, 1, dtype=D)
        else:
            self.embedding = sg.VocabParallelEmbedding(11, 5, mesh=mesh, dtype=D)
            self.norm = sg.LayerNorm(5, mesh=mesh, dtype=D)
            self.up = sg.ColumnParallelLinear(5, 7, mesh=mesh, dtype=D)
            self.down = sg.RowParallelLinear(7, 5, mesh=mesh, dtype=D)
            self.one = sg.RowParallelLinear(5, 1, mesh=mesh, dtype=D)
        self.plain = nn.Linear(5, 3, dtype=D)
        self.mesh = mesh

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids))
        x = x + self.down(torch.tanh(self.up(x)))
        part = x if self.mesh is None else sg.slice_replicated(x, self.mesh, "tp", -1)
        return torch.cat((self.plain(x), self.one(part)), -1)


def fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model.get_submodule("up"), mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DDP(model, process_group=mesh["dp"].get_group())


WRAPS = {"fsdp": fsdp, "ddp": ddp}


def filled(seed: int = 0) -> Model:
    """One device's model."""
    model = Model(None)
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 * seed + at))
    return model


def backward(model: nn.Module, batch: slice, share: int) -> None:
    """Of the mean over 6 sequences: this rank's term, times as many ranks as average it."""
    ids = torch.randint(0, 11, (6, 3), generator=torch.Generator().manual_seed(1))[batch]
    dy = randn(6, 3, 4, seed=2)[batch]
    (share * (model(ids) * dy).sum()).backward()


def rows(mesh: DeviceMesh) -> slice:
    size, index = mesh["dp"].size(), mesh["dp"].get_local_rank()
    return slice(index * 6 // size, (index + 1) * 6 // size)


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in state.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter, sharding in sg.named_shardings(model):
        grad = parameter.grad
        assert grad is not None, name
        part = grad.full_tensor() if isinstance(grad, DTensor) else grad
        found[name] = part if sharding is None else sharding.unshard(part)
    return found


def start(wrap: str, mesh: DeviceMesh, parted: bool = True) -> tuple[nn.Module, Model]:
    """A model and one device's, of the same values."""
    layers = mesh["tp"] if parted else mesh
    model, plain = Model(layers), filled()
    with torch.no_grad():
        for parameter in model.plain.parameters():
            parameter.zero_()
    wrapped = WRAPS[wrap](model, mesh)
    state = plain.state_dict()
    sg.load_state_dict(wrapped, {("module." if wrap == "ddp" else "") + name: v for name, v in state.items()})
    return wrapped, plain


def shapes(world_size: int) -> list[tuple[int, int]]:
    return {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(2, 2)]}[world_size]


@distributed(world_size=[2, 4])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("parted", [True, False])
def test_a_step_as_on_one_device(world_size: int, wrap: str, parted: bool) -> None:
    for shape in shapes(world_size):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        model, plain = start(wrap, mesh, parted)
        assert sg.num_parameters(model) == sum(p.numel() for p in plain.parameters())
        assert_same(bare(sg.state_dict(model)), plain.state_dict(), 0)
        optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1) for one in (model, plain)]
        for order, most in ((2.0, 0.7), (math.inf, 0.1), (1.0, 1e6)):
            for one in (model, plain):
                one.zero_grad()
            backward(model, rows(mesh), shape[0])
            backward(plain, slice(None), 1)
            gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
            assert_same(bare(whole_gradients(model)), gradients)
            expected = nn.utils.clip_grad_norm_(plain.parameters(), most, order)
            found = sg.clip_grad_norm_(model, most, order)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
            assert_same(bare(whole_gradients(model)), gradients)  # scaled, both of them
            for optimizer in optimizers:
                optimizer.step()
            assert_same(bare(sg.state_dict(model)), plain.state_dict(), 1e-9)
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long))  # leaves the root's parameters gathered
        assert_same(bare(sg.state_dict(model)), plain.state_dict(), 1e-9)
        assert sg.check_replicas(model, optimizers[0], mesh=mesh) or shape[1] == 1
        odd = next(p for name, p in model.named_parameters() if name.endswith("plain.bias"))
        with torch.no_grad():
            (odd.to_local() if isinstance(odd, DTensor) else odd).add_(mesh["tp"].get_local_rank())
        if shape[1] > 1:
            with pytest.raises(sg.VerificationError, match=r"value of \S*plain.bias: over tp"):
                sg.check_replicas(model, optimizers[0], mesh=mesh)


@distributed(world_size=[2, 4])
@pytest.mark.parametrize("wrap", WRAPS)
def test_checkpoints_go_from_and_to_shards_of_shards(world_size: int, wrap: str, tmp_path: Path) -> None:
    for at, shape in enumerate(shapes(world_size)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        model, _ = start(wrap, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        backward(model, rows(mesh), shape[0])
        optimizer.step()
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long))
        folder = tmp_path / f"{wrap}{at}"
        checkpoint.save(folder, model, optimizer, mesh=mesh)
        other, _ = start(wrap, mesh)
        resumed = torch.optim.AdamW(other.parameters(), lr=0.1)
        with torch.no_grad():
            other(torch.zeros(1, 3, dtype=torch.long))
        checkpoint.load(folder, other, resumed)
        assert_same(dict(sg.state_dict(other)), dict(sg.state_dict(model)), 0)
        for one, each in ((model, optimizer), (other, resumed)):
            one.zero_grad()
            backward(one, rows(mesh), shape[0])
            each.step()
        assert_same(dict(sg.state_dict(other)), dict(sg.state_dict(model)), 0)
        if wrap == "fsdp":  # the same names and tensors without it
            alone = Model(mesh)
            own = torch.optim.AdamW(alone.parameters(), lr=0.1)
            checkpoint.load(folder, alone, own)
            state = own.state[alone.up.weight]
            assert state["exp_avg"].shape == alone.up.weight.shape
            checkpoint.save(tmp_path / f"again{at}", alone, own, mesh=mesh)
            for file in ("model.safetensors", "optimizer.safetensors"):
                assert (tmp_path / f"again{at}" / file).read_bytes() == (folder / file).read_bytes()


@distributed(world_size=4)
def test_dtensors_over_what_shards_already_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = sg.ColumnParallelLinear(3, 5, mesh=mesh["tp"], bias=False)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh["tp"], [Shard(0)], src_data_rank=None))
    with pytest.raises(sg.MeshError, match=r"weight is a DTensor .* W\[m/tp,d\]: along axis 'tp' .* mesh=mesh\['dp'\]"):
        sg.clip_grad_norm_(layer, 1.0)
    model = nn.Sequential(sg.ColumnParallelLinear(3, 5, mesh=mesh), nn.Linear(4, 3))
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(sg.LayoutError, match=r"0.weight is in shards of a shard \(FSDP2\)"):
        sg.state_dict(model, as_dtensor=True)


@distributed(world_size=[1, 2, 4])
def test_ranks_that_are_no_replicas_are_refused_before_anything_is_sent(world_size: int) -> None:
    for shape in shapes(world_size):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        alone = sg.ColumnParallelLinear(4, 4, mesh=mesh["tp"])
        for model in (alone, nn.Sequential(nn.Linear(2, 4), nn.ModuleDict({"in": alone})), Model(mesh)):
            before = [p.detach().clone() for p in model.parameters()]
            if shape[1] == 1:
                DDP(model)
                continue
            with pytest.raises(sg.MeshError, match=r"DistributedDataParallel takes ranks 0, 1.*get_group"):
                DDP(model)
            with pytest.raises(sg.MeshError, match=r"along which"):
                DDP(model, device_mesh=mesh["tp"])
            with pytest.raises(sg.MeshError, match=r"fully_shard takes ranks .* mesh=mesh\['dp'\]"):
                fully_shard(model, mesh=mesh["tp"])
            for old, parameter in zip(before, model.parameters()):
                assert torch.equal(old, parameter)
            DDP(model, process_group=mesh.get_group("dp"))
            DDP(model, device_mesh=mesh["dp"])
    replicas = nn.Sequential(sg.LayerNorm(3, mesh=mesh["tp"]), nn.Linear(3, 3))
    DDP(replicas)  # nothing of it is sharded


@distributed(world_size=4)
def test_a_group_across_the_rows_of_the_mesh_is_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = sg.RowParallelLinear(4, 4, mesh=mesh["tp"])
    groups = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]  # they share no row of tp
    own = groups[0 if dist.get_rank() in (0, 3) else 1]
    with pytest.raises(sg.MeshError, match=r"other shards than this rank.s are on rank [0123]:"):
        DDP(layer, process_group=own)


@distributed(world_size=2)
def test_a_forward_under_ddp_is_the_second_line(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(2, 4))
    wrapped = DDP(model)
    model.append(sg.ColumnParallelLinear(4, 4, mesh=mesh))  # where no constructor sees it
    with pytest.raises(sg.MeshError, match=r"ColumnParallelLinear.weight is sharded over axis 'tp'"):
        wrapped(torch.ones(1, 2))
