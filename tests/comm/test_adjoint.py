"""Each differentiable collective and its adjoint, exactly on integers: what they compute, and <A g, x> = <g, A x>."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.layout.sizes import chunk
from shardgrad.testing import distributed


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


def over_ranks(value: torch.Tensor) -> float:
    total = value.clone()
    dist.all_reduce(total)
    return float(total)


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("told", [True, False])
def test_forward_and_backward(world_size: int, dim: int, size: int, told: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rank = mesh.get_local_rank("tp")
    shape = [3, 2, 4]
    shape[dim] = size
    whole = tuple(shape)
    alike = numbers(whole, 1)  # the same on all ranks
    different = [numbers(whole, 2 + r) for r in range(world_size)]
    at, length = chunk(size, world_size, rank)
    mine = alike.narrow(dim, at, length)
    known = {"size": size} if told else {}

    def run(function, x, grad, **kwargs):  # type: ignore[no-untyped-def]
        x = x.clone().requires_grad_()
        y = function(x, mesh, "tp", **kwargs)
        y.backward(grad)
        assert y.shape == grad.shape
        return y.detach(), x.grad

    total = torch.stack(different).sum(0)
    y, g = run(sg.replicate, alike, different[rank])
    assert torch.equal(y, alike)
    assert torch.equal(g, total)
    y, g = run(sg.all_reduce, different[rank], alike)
    assert torch.equal(y, total)
    assert torch.equal(g, alike)
    y, g = run(sg.all_gather, mine, different[rank], dim=dim, **known)
    assert torch.equal(y, alike)
    assert torch.equal(g, total.narrow(dim, at, length))
    y, g = run(sg.gather_replicated, mine, alike, dim=dim, **known)
    assert torch.equal(y, alike)
    assert torch.equal(g, mine)
    y, g = run(sg.reduce_scatter, different[rank], mine, dim=dim)
    assert torch.equal(y, total.narrow(dim, at, length))
    assert torch.equal(g, alike)
    y, g = run(sg.slice_replicated, alike, mine, dim=dim)
    assert torch.equal(y, mine)
    assert torch.equal(g, alike)


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize(("split_dim", "concat_dim"), [(0, 1), (1, 0), (2, 0), (-1, 1), (1, 2)])
def test_all_to_all_moves_the_cut_from_one_dim_to_another(world_size: int, split_dim: int, concat_dim: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rank = mesh.get_local_rank("tp")
    full, grad = numbers((5, 7, 3), 1), numbers((5, 7, 3), 2)

    def cut(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.narrow(dim, *chunk(tensor.shape[dim], world_size, rank))

    x = cut(full, concat_dim).clone().requires_grad_()
    for size in (full.shape[concat_dim], None):
        x.grad = None
        y = sg.all_to_all(x, mesh, split_dim=split_dim, concat_dim=concat_dim, size=size)
        assert torch.equal(y, cut(full, split_dim))
        y.backward(cut(grad, split_dim))
        assert x.grad is not None
        assert torch.equal(x.grad, cut(grad, concat_dim))


@distributed(world_size=[2, 3])
def test_each_pair_is_adjoint_in_the_inner_product_over_all_ranks(world_size: int) -> None:
    """Summed over ranks, where a replicated value counts once a rank: <A x, g> = <x, A* g> for pairs whose other half
    is a sum; `all_reduce` and `gather_replicated` are adjoint for gradients that are alike, counted once."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rank = mesh.get_local_rank("tp")
    for name, kwargs in (
        ("all_gather", {"dim": 1}),
        ("reduce_scatter", {"dim": 1}),
        ("all_to_all", {"split_dim": 0, "concat_dim": 1}),
    ):
        length = chunk(7, world_size, rank)[1]
        x = numbers((5, 7 if name == "reduce_scatter" else length), 10 + rank).requires_grad_()
        y = getattr(sg, name)(x, mesh, "tp", **kwargs)
        g = numbers(tuple(y.shape), 20 + rank)
        y.backward(g)
        assert x.grad is not None
        assert over_ranks((y.detach() * g).sum()) == over_ranks((x.detach() * x.grad).sum()), name
    alike = numbers((5, 7), 3).requires_grad_()
    g = numbers((5, 7), 30 + rank)
    sg.replicate(alike, mesh).backward(g)
    assert alike.grad is not None
    assert over_ranks((alike.detach() * g).sum()) == float((alike.detach() * alike.grad).sum())


@distributed(world_size=2)
def test_inputs_are_not_changed_and_wrong_ones_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    x = torch.ones(3, 4)
    sg.all_reduce(x, mesh)
    assert torch.equal(x, torch.ones(3, 4))
    transposed = torch.arange(6.0).view(2, 3).T
    assert torch.equal(sg.all_reduce(transposed, mesh), 2 * transposed)
    with pytest.raises(sg.ShapeError, match="dim 2 is out of range"):
        sg.slice_replicated(x, mesh, dim=2)
    with pytest.raises(sg.ShapeError, match="the dims must differ"):
        sg.all_to_all(x, mesh, split_dim=0, concat_dim=-2)
    with pytest.raises(sg.ShapeError, match="leaves rank"):
        sg.all_gather(x, mesh, dim=0, size=7 + mesh.get_local_rank("tp") * 2)
    with pytest.raises(sg.MeshError, match="no axis 'dp'"):
        sg.all_reduce(x, mesh, "dp")


@distributed(world_size=3)
def test_zero_elements_communicate_nothing(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    x = torch.ones(0, 4, requires_grad=True)
    with sg.trace_collectives() as traced:
        for y in (sg.all_gather(x, mesh, size=0), sg.all_reduce(x, mesh), sg.reduce_scatter(x, mesh)):
            assert y.shape == (0, 4)
            y.sum().backward()
    assert len(traced) == 0


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("width", [(), (3,), (2, 2)])
def test_rows_go_where_they_are_sent_and_their_gradients_come_back(world_size: int, width: tuple[int, ...]) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rank = mesh.get_local_rank("tp")
    # sends[s][r] rows from s to r; some none, and rank 2 sends and the last one receives nothing at all
    sends = [
        [0 if s == 2 or (r == 3) else (3 * s + 2 * r + 1) % 5 for r in range(world_size)] for s in range(world_size)
    ]
    blocks = [[numbers((sends[s][r], *width), 10 * s + r) for r in range(world_size)] for s in range(world_size)]
    grads = [[numbers((sends[s][r], *width), 100 + 10 * s + r) for r in range(world_size)] for s in range(world_size)]
    receive = [sends[s][rank] for s in range(world_size)]
    x = torch.cat(blocks[rank]).requires_grad_()
    with sg.trace_collectives() as traced:
        y = sg.all_to_all_rows(x, mesh, send=sends[rank], receive=receive)
        assert torch.equal(y, torch.cat([blocks[s][rank] for s in range(world_size)]))
        y.backward(torch.cat([grads[s][rank] for s in range(world_size)]))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.cat(grads[rank]))
    row = 8 * torch.Size(width).numel()
    sent = [(sum(sends[rank]) - sends[rank][rank]) * row, (sum(receive) - receive[rank]) * row]
    assert [(e.operation, e.bytes) for e in traced] == ([("all-to-all", n) for n in sent] if world_size > 1 else [])


@distributed(world_size=2)
def test_rows_that_do_not_add_up_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    x = torch.ones(3, 2)
    for send, receive, why in (
        ([1, 1], [1, 1], "does not have the 2 rows that are sent"),
        ([3], [3], "how many rows for each of the 2 ranks"),
        ([4, -1], [4, 1], "how many rows for each of the 2 ranks"),
        ([1, 2], [2, 1], "sends itself"),
    ):
        with pytest.raises(sg.ShapeError, match=why):
            sg.all_to_all_rows(x, mesh, send=send, receive=receive)


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("name", ["replicate", "all_reduce", "all_gather", "gather_replicated", "reduce_scatter"])
def test_second_derivatives_of_collectives(world_size: int, name: str) -> None:
    """x -> AᵀAx is linear and its own transpose, so its derivative along v is AᵀAv: exactly, on integers."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rank = mesh.get_local_rank("tp")
    rows = chunk(5, world_size, rank)[1] if "gather" in name else 5
    x, v = (numbers((rows, 3), 10 * seed + rank) for seed in (1, 2))

    def gradient(at: torch.Tensor) -> torch.Tensor:
        y = getattr(sg, name)(at, mesh, "tp")
        (grad,) = torch.autograd.grad((y * y).sum() / 2, at, create_graph=True)
        return grad

    leaf = x.clone().requires_grad_()
    (second,) = torch.autograd.grad((gradient(leaf) * v).sum(), leaf)
    expected = gradient(v.clone().requires_grad_())
    assert torch.equal(second, expected.detach())
    assert bool(second.any())
