"""Attention with its heads sharded, and the feed-forward block, against one device in float64."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from plain import assert_gradients_match, randn, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.nn.attention import Attention
from shardgrad.nn.mlp import MLP
from shardgrad.nn.rotary import Rotary
from shardgrad.testing import distributed

D = torch.float64
BATCH, SEQUENCE = 2, 5


def attention(mesh: DeviceMesh, heads: int, sequence_dim: int | None, **options: Any) -> Attention:
    """A layer whose every parameter, biases too, is some 0.5 in size: no term of the output is negligible."""
    layer = Attention(12, heads, mesh=mesh, sequence_dim=sequence_dim, dtype=D, **options)
    for at, (_, parameter, sharding) in enumerate(sg.named_shardings(layer)):
        assert sharding is not None
        with torch.no_grad():
            parameter.copy_(sg.shard(0.5 * randn(*sharding.shape, seed=20 + at), sharding.spec, mesh))
    return layer


def turned(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions as complex numbers: features j and j + k/2 of a head, times exp(i·position·base^(-2j/k))."""
    half = x.shape[-1] // 2
    theta = base ** (-2 * torch.arange(half, dtype=D) / x.shape[-1])
    angle = (positions.to(D)[..., None] * theta)[..., None, :]
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def by_hand(
    x: Tensor,
    p: dict[str, Tensor],
    causal: bool = True,
    mask: Tensor | None = None,
    base: float | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Attention by its formula: softmax(Q Kᵀ / √k) V, head by head; the weights as the layer's, global."""
    q, k, v = (
        torch.einsum("bsd,hkd->bshk", x, p[f"{name}_weight"]) + p.get(f"{name}_bias", torch.zeros((), dtype=D))
        for name in ("query", "key", "value")
    )
    if base is not None and positions is not None:
        q, k = turned(q, positions, base), turned(k, positions, base)
    heads, groups = q.shape[2], k.shape[2]
    attended = [i // (heads // groups) for i in range(heads)]
    scores = torch.einsum("bshk,bthk->bhst", q, k[:, :, attended]) / sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    a = torch.einsum("bhst,bthk->bshk", scores.softmax(-1), v[:, :, attended])
    return torch.einsum("bshk,mhk->bsm", a, p["output_weight"]) + p.get("output_bias", torch.zeros((), dtype=D))


def check(layer: Attention, mesh: DeviceMesh, mask: Tensor | None = None, positions: Tensor | int = 0) -> None:
    """Y and every gradient against the formula, in float64."""
    x, dy = randn(BATCH, SEQUENCE, 12, seed=1), randn(BATCH, SEQUENCE, 12, seed=2)
    stored_x, stored_y = layer.input_layouts[0]["X"], layer.output_layout["Y"]
    local = sg.shard(x, stored_x, mesh).requires_grad_()
    params = {name: whole(p, sharding).requires_grad_() for name, p, sharding in sg.named_shardings(layer)}
    theirs = None if mask is None else mask.detach().clone().requires_grad_(mask.requires_grad)
    y = layer(local, mask=mask, positions=positions)
    y.backward(sg.shard(dy, stored_y, mesh))
    x.requires_grad_()
    at = torch.arange(SEQUENCE) + positions if isinstance(positions, int) else positions
    base = None if layer.rotary is None else layer.rotary.base
    expected = by_hand(x, params, layer.causal, theirs, base, at)
    expected.backward(dy)
    # Sums of some hundred terms of size 1: 1e-13 is hundreds of roundings, 1e10 times less than one lost term.
    torch.testing.assert_close(sg.unshard(y.detach(), stored_y, mesh), expected.detach(), rtol=1e-12, atol=1e-13)
    assert local.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(sg.unshard(local.grad, stored_x, mesh), x.grad, rtol=1e-12, atol=1e-12)
    if mask is not None and theirs is not None and mask.requires_grad:
        torch.testing.assert_close(mask.grad, theirs.grad, rtol=1e-11, atol=1e-12)
        assert theirs.grad is not None
        assert float(theirs.grad.abs().max()) > 1e-2
    largest = max(float(p.grad.abs().max()) for p in params.values() if p.grad is not None)
    found = sg.named_shardings(layer)
    assert len(found) == (8 if layer.output_bias is not None else 4)
    for name, parameter, sharding in found:
        assert parameter.grad is not None, name
        right = params[name].grad
        assert right is not None
        if name == "key_bias" and layer.rotary is None:  # adds the same to all scores of a row: softmax does not see it
            assert float(right.abs().max()) < 1e-13 * largest
        torch.testing.assert_close(
            whole(parameter.grad, sharding), right, rtol=1e-11, atol=1e-13 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("heads", [1, 3, 6])
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_equals_attention_by_its_formula(world_size: int, heads: int, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    check(attention(mesh, heads, sequence_dim), mesh)


# Query heads, KV heads: dividing, cutting groups apart, fewer KV heads than ranks, ranks without heads.
GROUPED = [(6, 3), (6, 2), (9, 3), (5, 1), (4, 2), (8, 2), (10, 5)]


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPED)
def test_query_heads_attend_their_kv_heads_however_they_are_cut(world_size: int, heads: int, kv_heads: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    odd = heads % 4 == 2
    rotary = Rotary(4, base=50.0) if odd else None
    layer = attention(mesh, heads, 1 if odd else None, num_kv_heads=kv_heads, head_dim=4, bias=heads < 8, rotary=rotary)
    check(layer, mesh)


def masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    attends = torch.rand(BATCH, 6, SEQUENCE, SEQUENCE, generator=generator) < 0.6
    attends |= torch.eye(SEQUENCE).bool()  # every query attends something
    padding = torch.ones(BATCH, 1, 1, SEQUENCE, dtype=torch.bool)
    padding[1, ..., 3:] = False
    return {
        "padding": padding,
        "boolean, each head": attends,
        "boolean, all": attends[0, 0],
        "added, each head": randn(6, SEQUENCE, SEQUENCE, seed=10).requires_grad_(),
        "added, all": randn(BATCH, 1, SEQUENCE, SEQUENCE, seed=11).requires_grad_(),
    }


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "causal"),
    [*((kind, kind != "padding") for kind in masks()), ("added, each head", False), ("boolean, all", False)],
)
def test_masks_are_global_and_their_gradients_complete(world_size: int, kind: str, causal: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layer = attention(mesh, 6, None if causal else 1, num_kv_heads=2, causal=causal)
    check(layer, mesh, masks()[kind])


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("positions", [7, "each"])
def test_rotary_positions_are_those_of_the_whole_sequence(world_size: int, positions: int | str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layer = attention(mesh, 3, 1, num_kv_heads=3, head_dim=6, causal=False, rotary=Rotary(6))
    each = torch.tensor([[0, 1, 2, 3, 4], [11, 3, 5, 0, 2]])
    check(layer, mesh, positions=each if isinstance(positions, str) else positions)


@distributed(world_size=[1, 2, 3, 4])
def test_kv_heads_are_stored_cut_where_the_cuts_align(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for heads, kv_heads in (*GROUPED, (7, 7)):
        layer = attention(mesh, heads, None, num_kv_heads=kv_heads, head_dim=2)
        query, key = (layer.shardings()[name] for name in ("query_weight", "key_weight"))
        assert query.shape == (heads, 2, 12)
        assert key.shape == (kv_heads, 2, 12)
        share = heads // kv_heads
        most = -(-heads // world_size)
        cut = [range(min(r * most, heads), min(r * most + most, heads)) for r in range(world_size)]
        most_kv = -(-kv_heads // world_size)
        cut_kv = [
            set(range(min(r * most_kv, kv_heads), min(r * most_kv + most_kv, kv_heads))) for r in range(world_size)
        ]
        aligned = [{i // share for i in part} for part in cut] == cut_kv
        assert key.spec.axes == (("tp",) if aligned else ())
        assert layer.shardings()["value_bias"].spec.axes == key.spec.axes


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("sequence_dim", [None, 1])
@pytest.mark.parametrize(("heads", "kv_heads", "bias"), [(3, 3, True), (6, 2, True), (6, 1, False)])
def test_sends_what_it_predicts(
    world_size: int, sequence_dim: int | None, heads: int, kv_heads: int, bias: bool
) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layer = attention(mesh, heads, sequence_dim, num_kv_heads=kv_heads, bias=bias)
    stored_x = layer.input_layouts[0]["X"]
    local = sg.shard(randn(BATCH, SEQUENCE, 12, seed=1), stored_x, mesh).requires_grad_()
    for _ in range(2):  # in the first call, ranks also compare what they see for the first time
        with sg.trace_collectives() as traced:
            y = layer(local, SEQUENCE)
            y.backward(torch.ones_like(y))
    predicted = layer.collectives(BATCH, SEQUENCE, D)
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
        (event.operation, event.axis, event.bytes) for event in traced
    )
    assert bool(predicted) == (world_size > 1)


@distributed(world_size=[2, 3])
def test_one_gather_feeds_three_products(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layer = attention(mesh, 3, 1)
    moved = [(c.phase, c.operation, c.tensor) for c in layer.collectives(BATCH, SEQUENCE)]
    assert moved.count(("forward", "all-gather", "X")) == 1
    assert moved.count(("dX", "reduce-scatter", "dX")) == 1


@distributed(world_size=[3])
def test_refuses_what_it_cannot_be(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    with pytest.raises(sg.ShapeError, match=r"num_heads=5 must divide embed_dim=12"):
        Attention(12, 5, mesh=mesh)
    with pytest.raises(sg.ShapeError, match=r"sequence_dim is 1 or None, not 0"):
        Attention(12, 3, mesh=mesh, sequence_dim=0)
    with pytest.raises(sg.ShapeError, match=r"num_kv_heads=4 must divide num_heads=6"):
        Attention(12, 6, num_kv_heads=4, mesh=mesh)
    with pytest.raises(sg.ShapeError, match=r"heads have 4 features, but rotary turns 6"):
        Attention(12, 3, rotary=Rotary(6), mesh=mesh)
    with pytest.raises(sg.ShapeError, match=r"head_dim=3 must be even"):
        Rotary(3)
    with pytest.raises(sg.LayoutError, match=r"with reduce=False the caller gathers x"):
        Attention(12, 3, mesh=mesh, sequence_dim=1, reduce=False)
    layer = Attention(12, 3, rotary=Rotary(4), mesh=mesh)
    x = torch.ones(BATCH, SEQUENCE, 12)
    with pytest.raises(sg.ShapeError, match=r"broadcasts to \[b, h, s, s\] with h = 3, all heads; got \(2, 2, 5, 5\)"):
        layer(x, mask=torch.ones(2, 2, 5, 5).bool())
    with pytest.raises(sg.ShapeError, match=r"boolean .* or added .*, not torch.int64"):
        layer(x, mask=torch.ones(5, 5).long())
    with pytest.raises(sg.ShapeError, match=r"of the whole sequence, \[5\] or \[2, 5\], not \(3,\)"):
        layer(x, positions=torch.arange(3))
    with pytest.raises(sg.MeshError, match=r"no axis 'model'"):
        Attention(12, 3, mesh=mesh, axis="model")


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_mlp_equals_linear_gelu_linear(world_size: int, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(5)
    mlp = MLP(5, 7, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
    plain = nn.ModuleDict({"up": nn.Linear(5, 7, dtype=D), "down": nn.Linear(7, 5, dtype=D)})
    plain.load_state_dict({name: whole(p, sharding) for name, p, sharding in sg.named_shardings(mlp)})
    x, dy = randn(BATCH, SEQUENCE, 5, seed=1), randn(BATCH, SEQUENCE, 5, seed=2)
    stored = mlp.up.layout(3)["X"]
    local = sg.shard(x, stored, mesh).requires_grad_()
    y = mlp(local, SEQUENCE)
    y.backward(sg.shard(dy, stored, mesh))
    x.requires_grad_()
    expected = plain["down"](nn.functional.gelu(plain["up"](x)))
    expected.backward(dy)
    torch.testing.assert_close(sg.unshard(y.detach(), stored, mesh), expected.detach(), rtol=1e-12, atol=1e-13)
    assert local.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(sg.unshard(local.grad, stored, mesh), x.grad, rtol=1e-11, atol=1e-13)
    assert_gradients_match(mlp, plain)


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize(("sequence_dim", "bias"), [(None, False), (1, True), (0, False)])
def test_swiglu_by_its_formula_sends_what_it_predicts(world_size: int, sequence_dim: int | None, bias: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(5)
    layer = sg.SwiGLU(5, 7, bias=bias, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
    shapes = {"gate": (5, 7), "up": (5, 7), "down": (7, 5)}
    plain = nn.ModuleDict({name: nn.Linear(*shape, bias, dtype=D) for name, shape in shapes.items()})
    plain.load_state_dict({name.replace("_", "."): whole(p, s) for name, p, s in sg.named_shardings(layer)})
    x, dy = randn(BATCH, SEQUENCE, 5, seed=1), randn(BATCH, SEQUENCE, 5, seed=2)
    stored = layer.layouts(3)[0]["X"]
    local = sg.shard(x, stored, mesh).requires_grad_()
    size = None if sequence_dim is None else x.shape[sequence_dim]
    for _ in range(2):  # in the first call, ranks also compare what they see for the first time
        layer.zero_grad()
        local.grad = None
        with sg.trace_collectives() as traced:
            y = layer(local, size)
            y.backward(sg.shard(dy, stored, mesh))
    x.requires_grad_()
    expected = plain["down"](nn.functional.silu(plain["gate"](x)) * plain["up"](x))
    expected.backward(dy)
    torch.testing.assert_close(sg.unshard(y.detach(), stored, mesh), expected.detach(), rtol=1e-12, atol=1e-13)
    assert local.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(sg.unshard(local.grad, stored, mesh), x.grad, rtol=1e-11, atol=1e-13)
    right = {name.replace(".", "_"): p.grad for name, p in plain.named_parameters()}
    assert len(right) == (6 if bias else 3)
    for name, parameter, how in sg.named_shardings(layer):
        assert parameter.grad is not None
        torch.testing.assert_close(whole(parameter.grad, how), right[name], rtol=1e-11, atol=1e-13, msg=name)
    predicted = layer.collectives((BATCH, SEQUENCE, 5), D)
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
        (event.operation, event.axis, event.bytes) for event in traced
    )
    if world_size > 1:
        assert [c.operation for c in predicted].count(
            "reduce-scatter" if sequence_dim is not None else "all-reduce"
        ) == 2


def test_rotary_turns_by_the_position_itself() -> None:
    """As complex numbers (Su et al., eq. 34): attention only sees differences of positions."""
    x, positions = randn(2, 3, 4, 6, seed=1), torch.tensor([0, 1, 7])
    angles = positions.to(D)[:, None] * 500.0 ** (-torch.arange(3, dtype=D) / 3)
    turns = torch.polar(torch.ones_like(angles), angles)
    right = torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turns[:, None])
    turned = sg.Rotary(6, base=500.0)(x, positions)
    torch.testing.assert_close(turned, torch.cat(right.unbind(-1), -1), rtol=1e-13, atol=1e-13)


@distributed(world_size=[2, 3])
def test_key_and_value_that_share_a_weight(world_size: int) -> None:
    """Tied, where KV heads are replicated: both uses count."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    tied = sg.Attention(12, 6, num_kv_heads=1, bias=False, mesh=mesh)
    apart = sg.Attention(12, 6, num_kv_heads=1, bias=False, mesh=mesh)
    apart.load_state_dict(tied.state_dict())
    tied.value_weight = tied.key_weight
    with torch.no_grad():
        apart.value_weight.copy_(tied.key_weight)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    for layer in (tied, apart):
        layer(x).square().sum().backward()
    assert tied.key_weight.grad is not None
    torch.testing.assert_close(tied.key_weight.grad, apart.key_weight.grad + apart.value_weight.grad)
