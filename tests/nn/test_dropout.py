"""Dropout: one mask for the global tensor, however it is sharded; drawn again where it must be the same, else anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.layout.notation import Dim, parse_tensor
from shardgrad.nn import init
from shardgrad.testing import distributed

SIZES = {"b": 3, "s": 5, "d": 7}


def kept(key: int, shape: tuple[int, ...], p: float) -> Tensor:
    """The mask by its definition: 32 bits of one Philox stream for each element of the global tensor."""
    count = int(np.prod(shape))
    bits = np.asarray(np.random.Philox(key=key).random_raw(-(-count // 2)), np.uint64).view(np.uint32)[:count]
    return torch.from_numpy(bits >= p * 2.0**32).view(shape)


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize(
    "spec", ["X[b,s,d]", "X[b/tp,s,d]", "X[b,s/tp,d]", "X[b,s,d/tp]", "X[b/tp/dp,s,d]", "X[b/dp,s,d/tp]"]
)
def test_the_mask_is_that_of_the_global_tensor(world_size: int, spec: str) -> None:
    stored = parse_tensor(spec)
    for grid in {(1, world_size), (world_size, 1), (2, world_size // 2) if world_size == 4 else (1, world_size)}:
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=("dp", "tp"))
        dropout = sg.Dropout(0.3, spec, mesh=mesh)
        full = torch.arange(1.0, 106.0, dtype=torch.float64).view(3, 5, 7)
        for sizes in (SIZES, None):
            torch.manual_seed(11)
            key = init.draw_seed()
            torch.manual_seed(11)
            x = sg.shard(full, stored, mesh).requires_grad_()
            y = dropout(x, sizes)
            mask = kept(key, (3, 5, 7), 0.3)
            expected = full * mask * (1 / 0.7)
            assert torch.equal(sg.unshard(y, stored, mesh, SIZES), expected)
            y.backward(sg.shard(full, stored, mesh))
            assert x.grad is not None
            assert torch.equal(sg.unshard(x.grad, stored, mesh, SIZES), expected)
            again = dropout(x, sizes)
            assert not torch.equal(sg.unshard(again, stored, mesh, SIZES), expected)  # another call, another mask


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_the_same_mask(world_size: int, reentrant: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    dropout = sg.Dropout(0.5, "X[b,s/tp,d]", mesh=mesh)
    down = sg.RowParallelLinear(6, 6, mesh=mesh, sequence_dim=1)

    def block(x: Tensor) -> Tensor:
        return dropout(down(dropout(x, {"s": 8})[..., :0].new_ones(2, 8, down.weight.shape[1]) * x.sum()), {"s": 8})

    results = []
    for recompute in (False, True):
        torch.manual_seed(6)
        x = torch.ones(2, sg.shard(torch.ones(8), sg.TensorSpec("s", (Dim("s", ("tp",)),)), mesh).numel(), 6)
        x.requires_grad_()
        down.zero_grad()
        y = checkpoint(block, x, use_reentrant=reentrant) if recompute else block(x)
        torch.randn(3)  # what comes between, and must not matter
        y.sum().backward()
        assert x.grad is not None
        assert down.weight.grad is not None
        results.append((y.detach(), x.grad, down.weight.grad.clone()))
    for first, second in zip(*results):
        assert torch.equal(first, second)
    assert 0 < int((results[0][0] == 0).sum()) < results[0][0].numel()


@distributed(world_size=[1, 2])
def test_none_all_and_evaluation(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    x = torch.tensor([[1.0, torch.inf, torch.nan]], requires_grad=True)
    state = torch.get_rng_state()
    assert sg.Dropout(0, "X[n,d]", mesh=mesh)(x) is x
    assert sg.Dropout(0.5, "X[n,d]", mesh=mesh).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    y = sg.Dropout(1, "X[n,d]", mesh=mesh)(x)
    assert torch.equal(y, torch.zeros(1, 3))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(1, 3))
    empty = sg.Dropout(0.5, "X[n,d]", mesh=mesh)(torch.ones(0, 3))
    assert empty.shape == (0, 3)
    assert sg.Dropout(0.5, "X[n]", mesh=mesh)(torch.ones(9, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="p is a probability"):
            sg.Dropout(p, "X[n]", mesh=mesh)
    with pytest.raises(sg.MeshError, match="no axis 'dp' of Dropout"):
        sg.Dropout(0.5, "X[n/dp]", mesh=mesh)
    with pytest.raises(sg.MeshError, match=r"axis 'tp' shards X\[n/tp\]"):
        sg.Dropout(0.5, "X[n/tp]", mesh=mesh, independent=("tp",))
    with pytest.raises(sg.ShapeError, match="has 2 dims, but the tensor"):
        sg.Dropout(0.5, "X[n,d]", mesh=mesh)(torch.ones(3))
    assert "p=0.5, X[n,d]" in repr(sg.Dropout(0.5, "X[n,d]", mesh=mesh))


@distributed(world_size=1)
def test_statistics(world_size: int) -> None:
    """Within 5 standard errors: the rate, the mean, and that neighbours in every dim, and calls, are independent."""
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    shape = (64, 50, 100)
    ones = torch.ones(shape)
    for p in (0.1, 0.5, 0.9):
        dropout = sg.Dropout(p, "X[b,s,d]", mesh=mesh)
        first, second = dropout(ones), dropout(ones)
        masks = [(y != 0).double() for y in (first, second)]
        sigma = (p * (1 - p) / ones.numel()) ** 0.5
        for y, mask in zip((first, second), masks):
            assert abs(float(mask.mean()) - (1 - p)) < 5 * sigma
            assert abs(float(y.double().mean()) - 1) < 5 * sigma / (1 - p) + 1e-6
            assert set(y.unique().tolist()) == {0.0, ones.mul(1 / (1 - p)).flatten()[0].item()}
        centred = [mask - (1 - p) for mask in masks]
        pairs = [(centred[0], centred[1])]
        for dim in range(3):
            n = shape[dim]
            pairs += [(centred[0].narrow(dim, 0, n - k), centred[0].narrow(dim, k, n - k)) for k in (1, 2, 4, 8)]
        for a, b in pairs:
            assert abs(float((a * b).mean())) < 5 * p * (1 - p) / a.numel() ** 0.5


@distributed(world_size=4)
def test_independent_axes_have_masks_of_their_own(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for seed in (lambda: 5, lambda: 5 + mesh.get_local_rank("dp")):  # seeded alike, or not, over dp
        torch.manual_seed(seed())
        dropout = sg.Dropout(0.5, "X[n,d]", mesh=mesh, independent=("dp",))
        y = dropout(torch.ones(8, 9))
        every = sg.unshard(y[None, None], parse_tensor("Y[r/dp,t/tp,n,d]"), mesh)
        assert torch.equal(every[0, 0], every[0, 1])
        assert torch.equal(every[1, 0], every[1, 1])
        assert not torch.equal(every[0, 0], every[1, 0])


@distributed(world_size=2)
def test_ranks_that_draw_otherwise_are_told(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    rank, standing = mesh.get_local_rank("tp"), view(mesh).axes["tp"].standing
    x = torch.ones(4, 3)
    torch.manual_seed(rank)
    with pytest.raises(sg.DisagreementError, match=r"a dropout mask(.|\n)*were the ranks seeded alike"):
        sg.Dropout(0.5, "X[n,d]", mesh=mesh)(x)
    torch.manual_seed(0)
    dropout = sg.Dropout(0.5, "X[n,d]", mesh=mesh)
    for _ in range(3):
        dropout(x)
    if rank == 0:
        torch.randn(1)  # another draw on one rank: noticed at the next power of two
    with pytest.raises(sg.DisagreementError):
        dropout(x)
    torch.manual_seed(0)
    before = standing.compared
    for _ in range(3):
        dropout(x)
    assert standing.compared == before
    with sg.check_every_call():
        dropout(x)
    assert standing.compared == before + 1


@distributed(world_size=2)
def test_sizes_that_are_told_are_not_exchanged(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dropout = sg.Dropout(0.5, "X[s/tp,d]", mesh=mesh)
    x = torch.ones(3 - mesh.get_local_rank("tp"), 2)
    for _ in range(4):
        dropout(x)
    for sizes, expected in (({"s": 5}, []), (None, ["all-to-all"])):
        with sg.trace_collectives() as traced:
            dropout(x, sizes)
        assert [event.operation for event in traced] == expected
