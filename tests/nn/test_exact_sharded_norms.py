"""Norms of features that an axis shards, in exact mode: equal bits on any mesh, and as torch's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from bits import Whole, differing, from_the_left
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.comm.trace import Trace
from shardgrad.errors import LayoutError
from shardgrad.layout.notation import parse_tensor
from shardgrad.testing import distributed

V = {"dp": 4, "tp": 4}
KINDS = ["rms", "layer"]
MORE = ["rms without weight", "layer without bias", "layer without parameters"]
STORED = [("h/tp", {"h": 4 * 19}), ("h/tp,k", {"h": 4, "k": 37}), ("h,k/tp", {"h": 3, "k": 4 * 7})]
BATCH, SEQUENCE = 8, 5
MESHES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]
EIGHT = [(1, 1), (1, 8), (8, 1), (2, 4), (4, 2)]


def made(kind: str, stored: str, sizes: dict[str, int], mesh: DeviceMesh) -> nn.Module:
    size = math.prod(sizes.values())
    where = {"stored": stored, "sizes": sizes, "mesh": mesh, "data": sg.BatchAxis("dp")}
    norm = {
        "rms": lambda: sg.RMSNorm(size, **where),
        "rms without weight": lambda: sg.RMSNorm(size, 1e-3, False, **where),
        "layer": lambda: sg.LayerNorm(size, **where),
        "layer without bias": lambda: sg.LayerNorm(size, bias=False, **where),
        "layer without parameters": lambda: sg.LayerNorm(size, elementwise_affine=False, **where),
    }[kind]()
    for seed, (_, parameter, sharding) in enumerate(sg.named_shardings(norm)):
        with torch.no_grad():
            parameter.copy_(sharding.shard(randn(size, seed=10 + seed)))
    return norm


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def passes(
    kind: str, stored: str, sizes: dict[str, int], pieces: dict[str, int] | None, dtype: torch.dtype = torch.float32
) -> Callable[[DeviceMesh], Whole]:
    """Forward and backward: y and all gradients, and the bytes of each rank as they were predicted."""

    def run(mesh: DeviceMesh) -> Whole:
        sg.set_exact(mesh, pieces)
        norm, spec = made(kind, stored, sizes, mesh), parse_tensor(f"X[b/dp,s,{stored}]")
        known = {"b": BATCH, "s": SEQUENCE, **sizes}
        first, dy = (randn(*known.values(), seed=seed) for seed in (1, 2))
        x = sg.shard((3 + 2 * first).to(dtype), spec, mesh).flatten(2).requires_grad_()
        norm(x)  # in the first call ranks compare what is cut
        with sg.trace_collectives() as traced:
            y = norm(x)
            y.backward(sg.shard(dy.to(dtype), spec, mesh).flatten(2))
        shape = (BATCH, SEQUENCE, math.prod(sizes.values()))
        predicted = norm.collectives(shape, dtype)  # type: ignore[operator]
        assert Counter((c.operation, c.axis, c.bytes) for c in predicted) == sent(traced)
        assert x.grad is not None
        here = sg.shard(first, spec, mesh).shape
        values = {name: sg.unshard(t.view(here), spec, mesh, known) for name, t in (("y", y.detach()), ("dx", x.grad))}
        for name, parameter, sharding in sg.named_shardings(norm):
            values[name] = sharding.unshard(parameter.grad)
        return values

    return run


def sent(traced: Trace) -> Counter[tuple[str, str, int]]:
    return Counter((event.operation, event.axis, event.bytes) for event in traced)


def check(kind: str, meshes: list[tuple[int, int]], pieces: dict[str, int], dtype: torch.dtype = torch.float32) -> None:
    for stored, sizes in STORED:
        sizes = {letter: size * pieces["tp"] // 4 if f"{letter}/" in stored else size for letter, size in sizes.items()}
        assert differing(("dp", "tp"), meshes, passes(kind, stored, sizes, pieces, dtype)) == {}, stored


@distributed(world_size=[4])
@pytest.mark.parametrize("kind", ["rms", pytest.param("layer", marks=pytest.mark.slow)])
def test_equal_bits_and_bytes_as_predicted(world_size: int, kind: str) -> None:
    check(kind, MESHES, V)


@distributed(world_size=[4])
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.slow
def test_more_kinds_and_dtypes(world_size: int, kind: str, dtype: torch.dtype) -> None:
    check(kind, MESHES, V, dtype)
    check(kind, [(1, 1), (1, 2), (4, 1)], {"dp": 4, "tp": 6}, dtype)


@distributed(world_size=[8])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_ranks(world_size: int, kind: str) -> None:
    check(kind, EIGHT, {"dp": 8, "tp": 8})


@pytest.mark.slow
@distributed(world_size=[4])
@pytest.mark.parametrize("kind", KINDS)
def test_without_pieces_of_an_axis_or_the_tree_bits_differ(world_size: int, kind: str) -> None:
    """So each of them is needed, and this data would show it."""
    for stored, sizes in STORED:

        def differs(shapes: list[tuple[int, int]], pieces: dict[str, int] | None) -> dict[tuple[int, ...], list[str]]:
            return differing(("dp", "tp"), shapes, passes(kind, stored, sizes, pieces))  # noqa: B023

        assert "weight" in differs([(1, 1), (2, 1)], {"tp": 4})[2, 1]
        assert "y" in differs([(1, 1), (1, 2)], {"dp": 4})[1, 2]
        assert "y" in differs([(1, 1), (1, 2)], None)[1, 2]
        with from_the_left():
            left = differs([(1, 1), (1, 2)], V)
        assert "dx" in left[1, 2]
        # a layer's moments only move in forward, and are put together in one order anyway
        assert ("y" in left[1, 2]) == (kind == "rms")


@distributed(world_size=[2])
@pytest.mark.parametrize("kind", KINDS)
def test_as_torchs(world_size: int, kind: str) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    for stored, sizes in STORED:
        found = passes(kind, stored, sizes, V)(mesh)
        size = math.prod(sizes.values())
        plain = nn.RMSNorm(size) if kind == "rms" else nn.LayerNorm(size)
        with torch.no_grad():
            for seed, parameter in enumerate(plain.parameters()):
                parameter.copy_(randn(size, seed=10 + seed))
        shape = (BATCH, SEQUENCE, size)
        x = (3 + 2 * randn(*shape, seed=1)).requires_grad_()
        y = plain(x)
        y.backward(randn(*shape, seed=2))
        assert x.grad is not None
        right = {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in plain.named_parameters()}}
        assert right.keys() == found.keys()
        for name, value in right.items():
            torch.testing.assert_close(found[name].reshape(value.shape), value, rtol=2e-5, atol=2e-5)


@distributed(world_size=[2])
def test_pieces_that_do_not_divide_the_features_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    sg.set_exact(mesh, V)
    norm = sg.RMSNorm(6, stored="h/tp", mesh=mesh)
    with pytest.raises(LayoutError, match="is not 2 equal pieces"):
        norm(torch.ones(2, 3))


@distributed(world_size=[2])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_several_dims_have_the_bits_of_one(world_size: int, kind: str) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sg.set_exact(mesh, 4)
    given = {"stored": "h/tp,k", "mesh": mesh}
    build = sg.RMSNorm if kind == "rms" else sg.LayerNorm
    found = []
    for norm in (build((4, 37), **given), build(4 * 37, sizes={"h": 4, "k": 37}, **given)):
        with torch.no_grad():
            for seed, (_, parameter, sharding) in enumerate(sg.named_shardings(norm)):
                parameter.copy_(sharding.shard(randn(4 * 37, seed=seed).view(sharding.global_shape)))
        x, dy = (sg.shard(3 + randn(5, 4, 37, seed=seed), parse_tensor("X[s,h/tp,k]"), mesh) for seed in (7, 8))
        shape = (5, *norm.weight.shape)
        x = x.view(shape).requires_grad_()
        y = norm(x)
        y.backward(dy.view(shape))
        found.append([t.flatten() for t in (y.detach(), x.grad, *(p.grad for p in norm.parameters()))])
    for one, right in zip(*found, strict=True):
        assert torch.equal(one, right)
