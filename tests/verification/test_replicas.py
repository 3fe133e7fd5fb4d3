"""Replicas that come apart are found, and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import shardgrad as sg
from shardgrad.nn.module import ShardedModule
from shardgrad.testing import distributed
from shardgrad.verification.fingerprint import fingerprint

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (1023,), (1024,), (3, 1025), (700, 1024)])
def test_fingerprints_see_every_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    whole = torch.randint(0, 2 if dtype == torch.bool else 200, shape, generator=generator).to(dtype)
    before = int(fingerprint(whole))
    assert int(fingerprint(whole.clone())) == before
    raw = whole.clone().view(-1).view(torch.uint8)
    for at in {0, len(raw) // 2, len(raw) - 1}:
        for bit in (0,) if dtype == torch.bool else (0, 3, 7):
            other = raw.clone()
            other[at] ^= 1 << bit
            assert int(fingerprint(other.view(dtype).view(shape))) != before
    if whole.numel() > 2:
        other = whole.clone().view(-1)
        other[0], other[-1] = 1, 0
        swapped = other.clone()
        swapped[0], swapped[-1] = 0, 1
        assert int(fingerprint(other)) != int(fingerprint(swapped))


def test_fingerprints_are_of_bits_shapes_and_dtypes_not_of_strides() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 40, generator=generator)
    assert int(fingerprint(x.T.contiguous().T)) == int(fingerprint(x))
    nans = torch.full((5,), torch.nan)
    assert int(fingerprint(nans)) == int(fingerprint(nans.clone()))
    assert int(fingerprint(torch.zeros(2))) != int(fingerprint(-torch.zeros(2)))
    seen = {int(fingerprint(t)) for t in (x, x.T, x.view(-1), x.view(torch.int32), -x, x.flip(0), x.flip(1), 2 * x)}
    assert len(seen) == 8
    odd = torch.zeros(9, dtype=torch.float16)[1:]  # not where an int32 may begin
    assert int(fingerprint(odd)) == int(fingerprint(torch.zeros(8, dtype=torch.float16)))
    state = torch.get_rng_state()
    fingerprint(torch.zeros(5000))
    assert torch.equal(torch.get_rng_state(), state)


def test_two_flipped_signs_and_exchanged_rows_do_not_cancel() -> None:
    """Of sums modulo 2^64, top bits are what cancels most easily."""
    x = torch.randn(40, 1024, generator=torch.Generator().manual_seed(0))
    before = int(fingerprint(x))
    for one in range(0, 1024, 5):
        other = x.clone()
        other[3, one] *= -1
        other[7, 511] *= -1
        assert int(fingerprint(other)) != before
    assert int(fingerprint(x[torch.randperm(40)])) != before
    for rows in ((0, 1), (5, 39)):
        other = x.clone()
        other[list(rows)] = x[list(rows[::-1])]
        assert int(fingerprint(other)) != before


def model_of(mesh: DeviceMesh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        sg.LayerNorm(6, mesh=mesh),
        sg.ColumnParallelLinear(6, 13, mesh=mesh),
        nn.GELU(),
        sg.RowParallelLinear(13, 6, mesh=mesh),
    )


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
    return optimizer


@distributed(world_size=[1, 2, 3, 4])
def test_training_keeps_replicas_alike_and_each_kind_of_deviation_is_named(world_size: int, rank: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = model_of(mesh)
    optimizer = stepped(model)
    # Norm weight and bias, row bias: value, gradient, and three states of AdamW (step, exp_avg, exp_avg_sq) of each;
    # of the sharded ones nothing.
    assert sg.check_replicas(model, optimizer) == (15 if world_size > 1 else 0)
    assert sg.check_replicas(model, optimizer, gradients=False) == (12 if world_size > 1 else 0)
    assert sg.check_replicas(model) == (6 if world_size > 1 else 0)
    if world_size == 1:
        return
    bias, norm = model[3].bias, model[0].weight
    with torch.no_grad():
        model[1].weight += rank  # sharded: no replica
    sg.check_replicas(model, optimizer)
    with sg.trace_collectives() as traced:
        sg.check_replicas(model, optimizer)
    assert len(traced) == 1  # all of their fingerprints; which tensors there are is compared through the store
    odd = world_size - 1
    for tensor, said in (
        (bias.data, "value of 3.bias"),
        (norm.grad, "gradient of 0.weight"),
        (optimizer.state[bias]["exp_avg_sq"], "optimizer state of 3.bias (exp_avg_sq)"),
        (optimizer.state[norm]["step"], "optimizer state of 0.weight (step)"),
    ):
        kept = tensor.clone()
        if rank == odd:
            flat = tensor.view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))  # one bit
        with pytest.raises(sg.VerificationError) as caught:
            sg.check_replicas(model, optimizer, step=7)
        text = str(caught.value)
        assert said in text
        assert "at step 7" in text
        assert text.count("over tp") == 1
        if world_size > 2:
            assert f"rank {odd} deviates from ranks {', '.join(map(str, range(odd)))}" in text
        else:
            assert "rank 0 and rank 1 differ, none has a majority" in text
        tensor.copy_(kept)
    sg.check_replicas(model, optimizer)
    if rank == 0:
        norm.grad = None
    with pytest.raises(sg.VerificationError, match=r"gradient of 0\.weight: .*there is none on rank 0"):
        sg.check_replicas(model, optimizer)


@distributed(world_size=2)
def test_nan_is_alike_where_it_is_alike_and_a_forgotten_sum_is_found(world_size: int, rank: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = model_of(mesh)
    with torch.no_grad():
        model[0].weight[2] = torch.nan
    sg.check_replicas(model)
    wrong = sg.LayerNorm(6, mesh=mesh)  # rows are sharded, but no setting says so
    wrong(torch.randn(3, 6, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
    with pytest.raises(sg.VerificationError, match="a norm without sequence_dim where rows are sharded"):
        sg.check_replicas(wrong)
    right = sg.LayerNorm(6, mesh=mesh, sequence_dim=0)
    right(torch.randn(3, 6, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
    sg.check_replicas(right)


class Marked(ShardedModule):
    """A parameter sharded over tp, replicated over dp, whose gradient is left to the caller over dp."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh, ("dp", "tp"))
        self.declare("weight", "W[a/tp,b]{dp}", {"a": 5, "b": 3})
        nn.init.ones_(self.get_parameter("weight"))


@distributed(world_size=4)
def test_two_axes_and_what_lies_on_one_of_them(world_size: int, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Marked(mesh)
    weight = model.get_parameter("weight")
    weight.grad = torch.full_like(weight, float(rank))  # one term of a sum: not alike, and need not be
    sg.check_replicas(model)
    with torch.no_grad():
        weight[0] += mesh.get_local_rank("tp")
    sg.check_replicas(model)
    with torch.no_grad():
        weight[0] += rank == 3
    with pytest.raises(sg.VerificationError, match="over dp, rank 1 and rank 3 differ"):  # on ranks 0 and 2 as well
        sg.check_replicas(model)
    sg.check_replicas(model, axes=("tp",))
    with pytest.raises(ValueError, match=r"axes \['pp'\] are of no mesh: there are dp, tp"):
        sg.check_replicas(model, axes=("pp",))


@distributed(world_size=[2, 3])
def test_plain_parameters_and_dtensors(world_size: int, rank: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    plain = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="pass mesh="):
        sg.check_replicas(plain)
    assert sg.check_replicas(plain, mesh=mesh) == 2
    with torch.no_grad():
        plain.bias[1] += rank
    with pytest.raises(sg.VerificationError, match="value of bias"):
        sg.check_replicas(plain, mesh=mesh)
    foreign = nn.Module()
    values = torch.arange(6.0)
    foreign.alike = nn.Parameter(DTensor.from_local(values, mesh, [Replicate()]))
    foreign.cut = nn.Parameter(DTensor.from_local(values + rank, mesh, [Shard(0)]))
    sg.check_replicas(foreign)
    foreign.apart = nn.Parameter(DTensor.from_local(values + rank, mesh, [Replicate()], run_check=False))
    with pytest.raises(sg.VerificationError, match="value of apart") as caught:
        sg.check_replicas(foreign)
    assert "cut" not in str(caught.value)
    if rank == 0:
        foreign.more = nn.Parameter(DTensor.from_local(values, mesh, [Replicate()], run_check=False))
    with pytest.raises(sg.DisagreementError, match="rank 0: value more"):
        sg.check_replicas(foreign)
