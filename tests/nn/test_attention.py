"""Attention with its heads cut, and the feed-forward block, against one device in float64."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from plain import assert_gradients_match, randn, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.nn.attention import Attention
from shardgrad.nn.mlp import MLP
from shardgrad.testing import distributed

D = torch.float64
BATCH, SEQUENCE = 2, 5


def attention(mesh: DeviceMesh, heads: int, sequence_dim: int | None) -> Attention:
    """A layer whose every parameter, biases too, is some 0.5 in size: no term of the output is negligible."""
    layer = Attention(12, heads, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
    for at, (_, parameter, stored) in enumerate(sg.stored_parameters(layer)):
        assert stored is not None
        with torch.no_grad():
            parameter.copy_(sg.shard(0.5 * randn(*stored.shape, seed=20 + at), stored.spec, mesh))
    return layer


def by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Causal attention by its formula: softmax(Q Kᵀ / √k) V, head by head; the weights as the layer's, global."""
    q, k, v = (
        torch.einsum("bsd,hkd->bshk", x, p[f"{name}_weight"]) + p[f"{name}_bias"] for name in ("query", "key", "value")
    )
    scores = torch.einsum("bshk,bthk->bhst", q, k) / sqrt(q.shape[-1])
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    a = torch.einsum("bhst,bthk->bshk", weights, v)
    return torch.einsum("bshk,mhk->bsm", a, p["output_weight"]) + p["output_bias"]


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("heads", [1, 3, 6])
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_equals_attention_by_its_formula(world_size: int, heads: int, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layer = attention(mesh, heads, sequence_dim)
    x, dy = randn(BATCH, SEQUENCE, 12, seed=1), randn(BATCH, SEQUENCE, 12, seed=2)
    stored_x, stored_y = layer.input_layouts[0]["X"], layer.output_layout["Y"]
    local = sg.shard(x, stored_x, mesh).requires_grad_()
    y = layer(local)
    y.backward(sg.shard(dy, stored_y, mesh))
    params = {name: whole(p, stored).requires_grad_() for name, p, stored in sg.stored_parameters(layer)}
    x.requires_grad_()
    expected = by_hand(x, params)
    expected.backward(dy)
    # Sums of some hundred terms of size 1: 1e-13 is hundreds of roundings, 1e10 times less than one lost term.
    torch.testing.assert_close(sg.unshard(y.detach(), stored_y, mesh), expected.detach(), rtol=1e-12, atol=1e-13)
    assert local.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(sg.unshard(local.grad, stored_x, mesh), x.grad, rtol=1e-12, atol=1e-12)
    largest = max(float(p.grad.abs().max()) for p in params.values() if p.grad is not None)
    for name, parameter, stored in sg.stored_parameters(layer):
        assert parameter.grad is not None, name
        right = params[name].grad
        assert right is not None
        if name == "key_bias":  # adds the same to all scores of a row, which softmax does not see
            assert float(right.abs().max()) < 1e-13 * largest
        torch.testing.assert_close(
            whole(parameter.grad, stored), right, rtol=1e-11, atol=1e-13 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_sends_what_it_predicts(world_size: int, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layer = attention(mesh, 3, sequence_dim)
    stored_x = layer.input_layouts[0]["X"]
    local = sg.shard(randn(BATCH, SEQUENCE, 12, seed=1), stored_x, mesh).requires_grad_()
    for _ in range(2):  # in the first call, ranks also compare what they see for the first time
        with sg.trace() as traced:
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
    with pytest.raises(sg.MeshError, match=r"no axis 'model'"):
        Attention(12, 3, mesh=mesh, axis="model")


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_mlp_equals_linear_gelu_linear(world_size: int, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(5)
    mlp = MLP(5, 7, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
    plain = nn.ModuleDict({"up": nn.Linear(5, 7, dtype=D), "down": nn.Linear(7, 5, dtype=D)})
    plain.load_state_dict({name: whole(p, stored) for name, p, stored in sg.stored_parameters(mlp)})
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
