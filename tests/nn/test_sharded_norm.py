"""Norms over features that an axis shards, against torch's over all of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from plain import assert_gradients_match, load_from, randn
from test_compile import assert_same, tp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import shardgrad as sg
from shardgrad.layout.notation import parse_tensor
from shardgrad.nn.sharded_norm import sharded_layer_norm, sharded_rms_norm
from shardgrad.testing import distributed

D = torch.float64
KINDS = ["rms", "rms without eps", "rms without weight", "layer", "layer without bias", "layer without parameters"]
STORED = [  # the features' letters, as of x as well
    ("h/tp,k", {"h": 5, "k": 3}),
    ("h,k/tp", {"h": 2, "k": 5}),
    ("h/tp,k", {"h": 1, "k": 3}),  # ranks without features
    ("h/tp", {"h": 7}),
]


def both(kind: str, stored: str, sizes: dict[str, int], **where: object) -> tuple[nn.Module, nn.Module]:
    size = math.prod(sizes.values())
    given = {"stored": stored, "sizes": sizes, "dtype": D, **where}
    sharded, plain = {
        "rms": lambda: (sg.RMSNorm(size, 1e-3, **given), nn.RMSNorm(size, 1e-3, dtype=D)),
        "rms without eps": lambda: (sg.RMSNorm(size, **given), nn.RMSNorm(size, dtype=D)),
        "rms without weight": lambda: (sg.RMSNorm(size, 1e-3, False, **given), nn.RMSNorm(size, 1e-3, False)),
        "layer": lambda: (sg.LayerNorm(size, **given), nn.LayerNorm(size, dtype=D)),
        "layer without bias": lambda: (
            sg.LayerNorm(size, bias=False, **given),
            nn.LayerNorm(size, bias=False, dtype=D),
        ),
        "layer without parameters": lambda: (
            sg.LayerNorm(size, elementwise_affine=False, **given),
            nn.LayerNorm(size, elementwise_affine=False),
        ),
    }[kind]()
    with torch.no_grad():
        for name, parameter, sharding in sg.named_shardings(sharded):
            assert sharding is not None
            assert sharding.global_shape == (size,)
            parameter.copy_(sharding.shard(randn(size, seed=len(name))))
    return sharded, load_from(plain, sharded)


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_as_on_one_device_with_the_collectives_that_are_predicted(world_size: int, kind: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for stored, sizes in STORED:
        sharded, plain = both(kind, stored, sizes, mesh=mesh)
        shape = (3, 4, math.prod(sizes.values()))
        x, dy = 3 + randn(*shape, seed=1), randn(*shape, seed=2)
        rows = parse_tensor(f"X[a,b,{stored}]")
        local = sg.shard(x.unflatten(-1, list(sizes.values())), rows, mesh).flatten(2).requires_grad_()
        local_dy = sg.shard(dy.unflatten(-1, list(sizes.values())), rows, mesh).flatten(2)
        with sg.trace_collectives() as traced:
            y = sharded(local)
            y.backward(local_dy)
        x.requires_grad_()
        expected = plain(x)
        expected.backward(dy)
        assert local.grad is not None
        assert x.grad is not None
        for found, right in ((y, expected), (local.grad, x.grad)):
            mine = sg.shard(right.detach().unflatten(-1, list(sizes.values())), rows, mesh).flatten(2)
            torch.testing.assert_close(found.detach(), mine, rtol=1e-12, atol=1e-12)
        assert_gradients_match(sharded, plain)
        predicted = sharded.collectives(shape, D)  # type: ignore[operator]
        assert [(c.operation, c.axis, c.bytes) for c in predicted] == [(e.operation, e.axis, e.bytes) for e in traced]
        assert len(traced) == (2 if world_size > 1 else 0)


SEVERAL = [((5, 3), "h/tp,k"), ((2, 5), "h,k/tp"), ((7, 2, 3), "s/tp,h,k"), ((1, 4), "s/tp,d")]


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer without bias"])
def test_several_dims_are_normalized_as_torch_does(world_size: int, kind: str, balanced: bool) -> None:
    """Heads and their features as dims of their own; the sequence and the features."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    if balanced:
        sg.set_balanced(mesh)
    for shape, stored in SEVERAL:
        given = {"stored": stored, "mesh": mesh, "dtype": D}
        bias = kind == "layer"
        sharded = sg.RMSNorm(shape, 1e-3, **given) if kind == "rms" else sg.LayerNorm(shape, bias=bias, **given)
        plain = nn.RMSNorm(shape, 1e-3, dtype=D) if kind == "rms" else nn.LayerNorm(shape, bias=bias, dtype=D)
        with torch.no_grad():
            for name, parameter, sharding in sg.named_shardings(sharded):
                assert sharding is not None
                parameter.copy_(sharding.shard(randn(*shape, seed=len(name))))
        load_from(plain, sharded)
        x, dy = (3 + randn(2, 3, *shape, seed=seed) for seed in (1, 2))
        spec = parse_tensor(f"X[a,b,{stored}]")
        local = sg.shard(x, spec, mesh).requires_grad_()
        with sg.trace_collectives() as traced:
            y = sharded(local)
            y.backward(sg.shard(dy, spec, mesh))
        x.requires_grad_()
        expected = plain(x)
        expected.backward(dy)
        assert local.grad is not None
        assert x.grad is not None
        torch.testing.assert_close(y.detach(), sg.shard(expected, spec, mesh), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(local.grad, sg.shard(x.grad, spec, mesh), rtol=1e-12, atol=1e-12)
        assert_gradients_match(sharded, plain)
        predicted = sharded.collectives((2, 3, *shape), D)
        assert [(c.operation, c.bytes) for c in predicted] == [(e.operation, e.bytes) for e in traced]
        assert len(traced) == (2 if world_size > 1 else 0)


@distributed(world_size=[2, 3])
def test_second_derivatives_follow(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for kind in ("rms", "layer"):
        sharded, plain = both(kind, "h/tp", {"h": 7}, mesh=mesh)
        made = []
        for call, spec in ((sharded, parse_tensor("X[a,h/tp]")), (plain, parse_tensor("X[a,h]"))):
            x, dy, ddx = (sg.shard(randn(2, 7, seed=seed), spec, mesh).requires_grad_() for seed in (1, 2, 3))
            (first,) = torch.autograd.grad(call(x), x, dy, create_graph=True)
            made.append(torch.autograd.grad(first, x, ddx)[0])
        spec = parse_tensor("X[a,h/tp]")
        torch.testing.assert_close(made[0], sg.shard(made[1], spec, mesh), rtol=1e-11, atol=1e-12)


@distributed(world_size=[2, 3])
def test_a_mean_far_from_zero_does_not_cancel(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    x = (1000 + randn(5, 24, seed=1)).float()
    here = sg.shard(x, parse_tensor("X[n,m/tp]"), mesh)
    counts = [24 // world_size] * world_size
    found = sharded_layer_norm(here, None, None, 1e-5, counts, mesh)
    right = sg.shard(F.layer_norm(x.double(), (24,)), parse_tensor("X[n,m/tp]"), mesh)
    torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-4)  # sums of squares alone: off by 0.1


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows_are_summed_in_float32(world_size: int, dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    spec = parse_tensor("X[n,m/tp]")
    x, dy = (100 * randn(3, 600, seed=1)).to(dtype), randn(3, 600, seed=2).to(dtype)  # Σ x² is beyond float16
    for kind in ("rms", "layer"):
        here, whole = sg.shard(x, spec, mesh).requires_grad_(), x.double().requires_grad_()
        if kind == "rms":
            y, expected = sharded_rms_norm(here, None, 1e-6, 600, mesh), F.rms_norm(whole, (600,), None, 1e-6)
        else:
            counts = [600 // world_size] * world_size
            y, expected = (
                sharded_layer_norm(here, None, None, 1e-6, counts, mesh),
                F.layer_norm(whole, (600,), eps=1e-6),
            )
        y.backward(sg.shard(dy, spec, mesh))
        expected.backward(dy.double())
        assert y.dtype == dtype
        assert here.grad is not None
        assert whole.grad is not None
        half = torch.finfo(dtype).eps / 2
        for found, right in ((y.detach(), expected.detach()), (here.grad, whole.grad)):
            mine = sg.shard(right, spec, mesh)
            torch.testing.assert_close(found.double(), mine, rtol=1.01 * half, atol=2e-5 * float(mine.abs().max()))


@distributed(world_size=4)
def test_rows_over_another_axis(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    sharded, plain = both("layer", "h/tp,k", {"h": 3, "k": 2}, mesh=mesh, data=sg.BatchAxis())
    x, dy = randn(5, 2, 3, 2, seed=1), randn(5, 2, 3, 2, seed=2)
    spec = parse_tensor("X[a/dp,b,h/tp,k]")
    with sg.trace_collectives() as traced:
        sharded(sg.shard(x, spec, mesh).flatten(2).requires_grad_()).backward(sg.shard(dy, spec, mesh).flatten(2))
    plain(x.flatten(2)).backward(dy.flatten(2))
    assert_gradients_match(sharded, plain)
    predicted = sharded.collectives((5, 2, 6), D)  # type: ignore[operator]
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
        (e.operation, e.axis, e.bytes) for e in traced
    )


@distributed(world_size=2)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_compiled_in_one_graph(world_size: int, kind: str) -> None:
    mesh = tp(2)
    sharded, _ = both(kind, "h/tp,k", {"h": 5, "k": 3}, mesh=mesh)
    width = sharded.get_parameter("weight").shape[0]
    assert_same(sharded, [randn(2, 3, width, seed=1)], sharded, "aot_eager")


@distributed(world_size=2)
def test_wrong_uses_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    norm = sg.RMSNorm(15, stored="h/tp,k", sizes={"h": 5, "k": 3}, mesh=mesh)
    assert "features=[9, 6]" in repr(copy.deepcopy(norm))
    assert norm(torch.ones(2, [9, 6][mesh.get_rank()])).shape == (2, [9, 6][mesh.get_rank()])
    with pytest.raises(
        sg.ShapeError, match=r"RMSNorm: x has local shape \(2, 15\), but this rank has \(.,\) of the \(15,\) feat"
    ):
        norm(torch.ones(2, 15))
    for stored, sizes in (("h/tp,k", {"h": 5, "k": 2}), ("h/tp,k", {"h": 15}), ("h/tp,k", None)):
        with pytest.raises(sg.ShapeError, match="the letters are those of the normalized dims"):
            sg.RMSNorm(15, stored=stored, sizes=sizes, mesh=mesh)
    with pytest.raises(sg.ShapeError, match="the letters are those of the normalized dims"):
        sg.LayerNorm((5, 3), stored="h/tp,k", sizes={"h": 3, "k": 5}, mesh=mesh)
    with pytest.raises(sg.ShapeError, match="the letters are those of the normalized dims"):
        sg.LayerNorm((5, 3), stored="h/tp", mesh=mesh)
    both_dims = sg.LayerNorm((5, 3), stored="h/tp,k", mesh=mesh)
    with pytest.raises(
        sg.ShapeError, match=r"this rank has \(., 3\) of the \(5, 3\) features, which are the last dims"
    ):
        both_dims(torch.ones(2, 5, 3))
    for stored in ("h,k", "h/tp,k/tp", "h/dp,k"):
        with pytest.raises(sg.LayoutError, match="must shard one letter over the layer's axis, which is written 'tp'"):
            sg.LayerNorm(15, stored=stored, sizes={"h": 5, "k": 3}, mesh=mesh)
    with pytest.raises(sg.LayoutError, match=r"shards either features .* or rows"):
        sg.LayerNorm(15, stored="m/tp", mesh=mesh, sequence_dim=0)
    with pytest.raises(sg.ShapeError, match=r"a parameter of shape \(3,\) for x of local shape \(2, 4\)"):
        sharded_rms_norm(torch.ones(2, 4), torch.ones(3), 1e-6, 8, mesh)
    with pytest.raises(sg.ShapeError, match=r"x has 4 features on rank . of axis 'tp'"):
        sharded_layer_norm(torch.ones(2, 4), None, None, 1e-6, [4, 4, 4], mesh)
