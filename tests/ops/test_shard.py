"""Cutting and assembling, and what is said of tensors that do not fit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from exact import integers
from layouts import grids, random_layout, random_sizes
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad import Layout, ShapeError
from shardgrad.layout.notation import parse_tensor
from shardgrad.layout.sizes import chunk, slab
from shardgrad.testing import distributed


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_chunks_are_torch_chunks(parts: int) -> None:
    for size in range(12):
        expected = [len(part) for part in torch.arange(size).chunk(parts)] if size else []
        expected += [0] * (parts - len(expected))
        found = [chunk(size, parts, i) for i in range(parts)]
        assert [length for _, length in found] == expected
        assert [start for start, _ in found] == [min(sum(expected[:i]), size) for i in range(parts)]


def test_nested_cuts_chunk_the_chunk() -> None:
    whole = torch.arange(11)
    shape = {"a": 2, "b": 3}
    for a in range(2):
        for b in range(3):
            start, length = slab(11, ("a", "b"), shape, {"a": a, "b": b})
            parts = [*whole.chunk(2)[a].chunk(3), torch.empty(0, dtype=torch.long)]
            assert whole[start : start + length].tolist() == parts[b].tolist()


@distributed(world_size=[1, 2, 3, 4])
def test_unshard_undoes_shard(world_size: int) -> None:
    rng = random.Random(world_size)
    for dims in (1, 2):
        axes = ("p", "q")[:dims]
        for grid in grids(world_size, dims):
            mesh = init_device_mesh("cpu", grid, mesh_dim_names=axes)
            for at in range(10):
                layout = random_layout(rng, axes, marks=False)
                sizes = random_sizes(rng, layout)
                for spec in layout.tensors:
                    full = integers(spec, sizes, at)
                    local = sg.shard(full, spec, mesh)
                    assert local.is_contiguous()
                    own = {letter: sizes[letter] for letter in spec.letters}
                    for given in (own, None):  # told, and exchanged
                        again = sg.unshard(local, spec, mesh, given)
                        np.testing.assert_array_equal(again.numpy(), full.numpy())
                    if full.numel():
                        local.fill_(99)  # the shard's memory is its own
                        assert not bool((full == 99).any())
                        assert again.data_ptr() != local.data_ptr()


@distributed(world_size=[1, 3])
def test_unshard_sums_a_partial_product_and_leaves_the_shard_alone(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp}")
    mine = torch.full((2, 3), float(mesh.get_local_rank("tp") + 1))
    total = sg.unshard(mine, layout["Y"], mesh)
    assert torch.equal(total, torch.full((2, 3), float(sum(range(1, world_size + 1)))))
    assert torch.equal(mine, torch.full((2, 3), float(mesh.get_local_rank("tp") + 1)))
    assert torch.equal(sg.shard(mine, layout["Y"], mesh), mine)


@distributed(world_size=2)
def test_what_does_not_fit_is_said_with_the_numbers(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    column = "X[n,d] W[d,m/tp] -> Y[n,m/tp]"
    x, w = torch.ones(4, 5), torch.ones(5, 3)
    cases: list[tuple[type[Exception], list[str], dict[str, object]]] = [
        (
            ShapeError,
            ["W has local shape (6, 3)", "its d is 6 here", "be 5", "X[n,d] has local shape (4, 5)"],
            {"w": torch.ones(6, 3)},
        ),
        (ShapeError, ["X[n,d] has 2 dims", "has 3: shape (1, 4, 5)"], {"x": torch.ones(1, 4, 5)}),
        (
            ShapeError,
            ["its m/tp is 3 here", "should be 4", "because m = 8 is given", "8 over tp is sharded as [4, 4]"],
            {"sizes": {"m": 8}},
        ),
        (ShapeError, ["sizes names 'z'"], {"sizes": {"z": 8}}),
        (ShapeError, ["B has local shape (4,)", "its m/tp is 4 here", "should be 3"], {"bias": torch.ones(4)}),
        (ShapeError, ["W is torch.float64 but X is torch.float32"], {"w": w.double()}),
        (ShapeError, ["complex products are not supported"], {"x": x + 0j, "w": w + 0j}),
        (sg.MeshError, ["no axis 'dp'", "it has tp=2", "mesh_dim_names"], {"layout": "X[n/dp,d] W[d,m] -> Y[n/dp,m]"}),
        (sg.LayoutError, ["adds a bias B[m/tp], but none was given"], {"layout": column + " + B[m/tp]"}),
        (sg.LayoutError, ["save_gathered: no operand 'Z'"], {"save_gathered": ("Z",)}),
        (TypeError, ["save_gathered is a collection"], {"save_gathered": "X"}),
        (sg.LayoutError, ["illegal layout"], {"layout": "X[n/tp,d] W[d,m] -> Y[n,m]"}),
    ]
    for error, words, change in cases:
        arguments: dict[str, object] = {"x": x, "w": w, "layout": column, "mesh": mesh, **change}
        with pytest.raises(error) as caught:
            sg.matmul(**arguments)  # type: ignore[call-overload]
        for word in words:
            assert word in str(caught.value), caught.value
    with pytest.raises(TypeError, match="matmul needs a mesh"):
        sg.matmul(x, w, column)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="products of one input"):
        sg.matmul(x, [], mesh)
    with pytest.raises(sg.LayoutError, match="must write it alike"):
        sg.matmul(x, [(w, column), (w, "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]")], mesh)
    with pytest.raises(ShapeError, match="has 2 dims, but the tensor to shard has shape"):
        sg.shard(torch.ones(3), Layout(column)["X"], mesh)


@distributed(world_size=[2, 3])
def test_assembling_a_whole_tensor_is_an_error_with_its_size(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    whole = torch.randn(4, 5)
    with pytest.raises(ShapeError, match="because m = 5 is given"):
        sg.unshard(whole, "Y[n,m/tp]", mesh, sizes={"m": 5})
    assert torch.equal(sg.unshard(sg.shard(whole, "Y[n,m/tp]", mesh), "Y[n,m/tp]", mesh, sizes={"m": 5}), whole)


@distributed(world_size=[2, 3])
def test_shards_that_do_not_make_one_tensor_are_an_error_on_every_rank(world_size: int) -> None:
    """gloo ends the process, or fills the rest with what lay there."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rank = mesh.get_rank()
    with pytest.raises(sg.DisagreementError, match=r"a tensor to assemble:\n(.*\n)*.*d = "):
        sg.unshard(torch.ones(4 + rank, 5), "W[d,m/tp]", mesh)
    with pytest.raises(sg.DisagreementError, match=r"torch\.float64"):
        sg.unshard(torch.ones(4, 5, dtype=[torch.float32, torch.float64][rank % 2]), "W[d,m/tp]", mesh)
    with pytest.raises(sg.DisagreementError, match="n = "):
        sg.unshard(torch.ones(4 + rank, 5), "Y[n,m]{tp}", mesh)


def test_a_text_that_is_no_tensor_is_told_with_a_tensor() -> None:
    with pytest.raises(sg.LayoutError, match=r"\na tensor reads like  W\[d,m/tp\]$"):
        parse_tensor("d,m/tp")


@distributed(world_size=2)
def test_a_mesh_without_names_and_a_thing_that_is_no_mesh_are_refused(world_size: int) -> None:
    layout = Layout("X[n,d] W[d,m/tp] -> Y[n,m/tp]")
    with pytest.raises(sg.MeshError, match="have no names"):
        sg.shard(torch.ones(2, 2), layout["X"], init_device_mesh("cpu", (2,)))
    with pytest.raises(sg.MeshError, match="must be a torch DeviceMesh, not int"):
        sg.shard(torch.ones(2, 2), layout["X"], 3)  # type: ignore[arg-type]


@distributed(world_size=3)
def test_shards_that_are_not_cut_as_torch_cuts_are_refused_on_every_rank(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("tp",))
    rank = mesh.get_local_rank("tp")
    layout = Layout("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]")
    x = torch.ones((1, 2, 2)[rank], 4)  # torch.chunk shards 5 as 2, 2, 1
    with pytest.raises(ShapeError, match=r"have sizes \[1, 2, 2\], but 5 is sharded as \[2, 2, 1\]"):
        sg.matmul(x, torch.ones(4, 2), layout, mesh)
    with pytest.raises(ShapeError, match=r"have sizes \[1, 2, 2\]"):
        sg.unshard(x, layout["X"], mesh)


@distributed(world_size=[2, 3])
def test_sizes_are_exchanged_only_where_they_matter_and_traced(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    stored = Layout("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]")
    held = Layout("X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]")
    x = torch.ones(2, 4)
    for layout, sizes, expected in (
        (stored, None, ["int64", "float32"]),  # a shard of n tells no one how large n is
        (stored, {"n": 2 * world_size}, ["float32"]),
        (held, None, ["float32"]),  # X holds n whole
    ):
        for _ in range(2):
            with sg.trace_collectives() as traced:
                sg.matmul(x, torch.ones(4, 3), layout, mesh, sizes=sizes)
        assert [event.dtype for event in traced] == expected, layout


@distributed(world_size=2)
def test_a_tensor_may_be_given_as_text(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    full, layout = torch.randn(5, 7), Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp}")
    local = sg.shard(full, "W[d/tp,m]", mesh)
    assert torch.equal(local, sg.shard(full, layout["W"], mesh))
    assert torch.equal(sg.unshard(local, "W[d/tp,m]", mesh), full)
    terms = torch.full((2, 3), float(mesh.get_local_rank("tp") + 1))
    assert torch.equal(sg.unshard(terms, "Y[n,m]{tp}", mesh), torch.full((2, 3), 3.0))
    assert torch.equal(sg.unshard(terms, layout["Y"], mesh), torch.full((2, 3), 3.0))
    for wrong in ("W[d/tp", 3, layout):
        with pytest.raises((sg.LayoutError, TypeError), match="layout"):
            sg.shard(full, wrong, mesh)  # type: ignore[arg-type]
