"""Balanced axes: the arithmetic, every collective, products, and what is refused."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from exact import check
from layouts import grids, random_layout, random_sizes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.layout.cost import sent
from shardgrad.layout.sizes import chunk, chunks, is_torch_chunk, slab
from shardgrad.ops import reference
from shardgrad.testing import distributed


def balanced(*grid: int, names: tuple[str, ...] = ("tp",), axes: str | None = None) -> DeviceMesh:
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=names)
    sg.set_balanced(mesh, axes)
    return mesh


def test_shards_differ_by_one_and_none_is_empty_that_need_not_be() -> None:
    assert chunks(9, sg.Balanced(4)) == [3, 2, 2, 2]
    assert chunks(9, 4) == [3, 3, 3, 0]
    for ranks in range(1, 9):
        for size in range(20):
            parts = np.array_split(np.arange(size), ranks)
            found = [chunk(size, sg.Balanced(ranks), index) for index in range(ranks)]
            assert [list(range(start, start + length)) for start, length in found] == [list(part) for part in parts]
            assert is_torch_chunk(size, sg.Balanced(ranks)) is (chunks(size, ranks) == [len(part) for part in parts])
            assert is_torch_chunk(size, ranks)


def test_nested_splits_balance_each_level() -> None:
    shape = {"a": sg.Balanced(4), "b": sg.Balanced(4), "c": 2}
    whole = np.arange(26)  # 7 and 6, of which torch.chunk makes 2, 2, 2, 0
    for a, major in enumerate(reference.shard(whole, 0, 4, balanced=True)):
        for b, minor in enumerate(reference.shard(major, 0, 4, balanced=True)):
            for c, last in enumerate(reference.shard(minor, 0, 2)):
                start, length = slab(26, ("a", "b", "c"), shape, {"a": a, "b": b, "c": c})
                assert list(whole[start : start + length]) == list(last)


def test_a_reduction_that_shards_no_letter_is_counted_as_before() -> None:
    for rank in range(4):
        assert sent("all-reduce", 9, sg.Balanced(4), rank) == sent("all-reduce", 9, 4, rank)


def numbers(shape: list[int], seed: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


@distributed(world_size=[2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("size", [0, 4, 5, 7])
def test_collectives_forward_and_backward(world_size: int, dim: int, size: int) -> None:
    mesh = balanced(world_size)
    rank = mesh.get_local_rank("tp")
    shape = [3, 2, 4]
    shape[dim] = size
    alike, different = numbers(shape, 1), [numbers(shape, 2 + at) for at in range(world_size)]

    def part(whole: torch.Tensor, along: int = dim) -> torch.Tensor:
        return torch.from_numpy(np.array_split(whole.numpy(), world_size, axis=along)[rank].copy())

    def run(function, x, grad, **kwargs):  # type: ignore[no-untyped-def]
        x = x.clone().requires_grad_()
        y = function(x, mesh, "tp", **kwargs)
        y.backward(grad)
        return y.detach(), x.grad

    total = torch.stack(different).sum(0)
    for known in ({"size": size}, {}):
        y, g = run(sg.all_gather, part(alike), different[rank], dim=dim, **known)
        assert torch.equal(y, alike)
        assert torch.equal(g, part(total))
        y, g = run(sg.gather_replicated, part(alike), alike, dim=dim, **known)
        assert torch.equal(y, alike)
        assert torch.equal(g, part(alike))
    y, g = run(sg.reduce_scatter, different[rank], part(alike), dim=dim)
    assert torch.equal(y, part(total))
    assert torch.equal(g, alike)
    y, g = run(sg.slice_replicated, alike, part(alike), dim=dim)
    assert torch.equal(y, part(alike))
    assert torch.equal(g, alike)
    other = (dim % 3 + 1) % 3
    here, there = part(alike), part(alike, other)
    y, g = run(sg.all_to_all, here, there, split_dim=other, concat_dim=dim % 3, size=size)
    assert torch.equal(y, there)
    assert torch.equal(g, here)


@distributed(world_size=[2, 3, 4], timeout=120)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))])
def test_random_layouts_with_predicted_bytes(world_size: int, seed: int) -> None:
    rng = random.Random(100 * world_size + seed)
    for dims in (1, 2):
        axes = ("p", "q")[:dims]
        for grid in grids(world_size, dims):
            mesh = balanced(*grid, names=axes, axes=rng.choice((None, axes[-1])))
            for at in range(8):
                layout = random_layout(rng, axes)
                check(layout, mesh, random_sizes(rng, layout), seed=at, give_sizes=rng.random() < 0.7)


@distributed(world_size=[2, 3])
def test_in_chunks_beside_their_communication(world_size: int) -> None:
    mesh = balanced(world_size)
    sg.set_overlap(mesh, 2)
    for size in (4 * world_size, 4 * world_size + 1):
        for text in ("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]", "X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]"):
            sizes = {"n": size, "d": size + world_size, "m": size + 1}
            check(sg.Layout(text), mesh, sizes, give_sizes=False)  # of chunks there are more collectives


@distributed(world_size=3)
def test_shards_of_the_other_rule_are_told(world_size: int) -> None:
    mesh = balanced(3)
    layout = sg.Layout("X[n/tp,d] W[d,m] -> Y[n/tp,m]")
    lengths = chunks(4, 3)
    assert lengths == [2, 2, 0]
    x = torch.ones(lengths[mesh.get_local_rank("tp")], 2)
    with pytest.raises(sg.ShapeError, match=r"\[2, 2, 0\], but 4 is sharded as \[2, 1, 1\] \(balanced\)"):
        sg.unshard(x, layout["X"], mesh)
    with pytest.raises(sg.ShapeError, match=r"leaves rank \d of them \d \(balanced\)"):
        sg.all_gather(torch.ones([1, 2, 2][mesh.get_local_rank("tp")]), mesh, size=4)


@distributed(world_size=2)
def test_the_setting(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "ep"))
    sg.set_balanced(mesh, "tp")
    sg.set_balanced(mesh, ["tp"])
    assert {name: type(ranks) for name, ranks in view(mesh).shape.items()} == {"tp": sg.Balanced, "ep": int}
    assert view(mesh).axes["tp"].size is view(mesh).shape["tp"]
    sg.set_balanced(mesh, ())
    assert {type(axis.size) for axis in view(mesh).axes.values()} == {int}
    with pytest.raises(sg.MeshError, match="no axis 'dp' of set_balanced"):
        sg.set_balanced(mesh, ["dp"])
    sg.set_balanced(mesh)
    layer = sg.ColumnParallelLinear(3, 5, mesh=mesh)
    sg.set_balanced(mesh)  # as it is
    with pytest.raises(sg.MeshError, match=re.escape("axis 'tp' would shard otherwise than ColumnParallelLinear does")):
        sg.set_balanced(mesh, "ep")
    del layer
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sg.matmul(torch.ones(2, 3), torch.ones(3, 2), "X[n,d] W[d,m/tp] -> Y[n,m/tp]", other)
    with pytest.raises(sg.MeshError, match="otherwise than a product does"):
        sg.set_balanced(other)


@distributed(world_size=2)
def test_ranks_that_do_not_agree(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with pytest.raises(sg.DisagreementError, match=r"(?s)how the axes of the mesh shard.*balanced axes: (tp|none)"):
        sg.set_balanced(mesh, "tp" if dist.get_rank() else ())
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    goes_on = [lambda: sg.ColumnParallelLinear(3, 5, mesh=other), lambda: sg.set_balanced(other)][dist.get_rank()]
    with pytest.raises(sg.DisagreementError):  # one asks, and the other does not
        goes_on()
