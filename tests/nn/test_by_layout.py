"""`sg.Linear` on any layout against nn.Linear, and Megatron's flags of the parallel layers."""

from __future__ import annotations

import copy
import io
import pickle
from math import prod, sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import assert_gradients_match, load_from, randn, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.nn import init
from shardgrad.testing import distributed

D = torch.float64
SIZES = {"n": 7, "b": 3, "s": 5, "d": 7, "m": 9}

LAYOUTS = [
    ("X[n/r,d/c] W[m/c,d/r] -> Y[n/r,m/c]", {"r": 2, "c": 2}),
    ("X[n/k/r,d/c] W[m/c,d/r] -> Y[n/k/r,m/c]", {"k": 2, "r": 1, "c": 2}),
    ("X[n/a,d/b/c] W[d/b/a,m/c] -> Y[n/a/b,m/c]", {"a": 1, "b": 2, "c": 2}),
    ("X[b/dp,s/tp,d] W[m/tp,d/dp] -> Y[b/dp,s,m/tp] + B[m/tp/dp]", {"dp": 2, "tp": 2}),
    ("X[n/dp,d] W[d/dp,m] -> Y[n/dp,m]", {"dp": 3}),
    ("X[n,d/tp] W[m,d/tp] -> Y[n,m]", {"tp": 4}),
    ("X[n,d] W[d,m] -> Y[n,m]", {"tp": 1}),
]


@distributed(world_size=[1, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_on_any_layout_equals_torchs(world_size: int, bias: bool) -> None:
    for text, shape in LAYOUTS:
        if prod(shape.values()) != world_size or ("+" in text and not bias):
            continue
        mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
        layout = sg.Layout(text)
        torch.manual_seed(6)
        layer = sg.Linear(7, 9, bias, layout=text, mesh=mesh, dtype=D)
        plain = nn.Linear(7, 9, bias, dtype=D)
        turn = layout["W"].letters == ("d", "m")
        values = {name: whole(p, how) for name, p, how in sg.named_shardings(layer)}
        torch.manual_seed(6)
        seed = init.draw_seed()  # of the weight, which is the first
        shape_of_w = values["weight"].shape
        assert torch.equal(values["weight"], init.uniform(1 / sqrt(7), seed, shape_of_w, (0, 0), shape_of_w))
        plain.load_state_dict({name: v.T if turn and v.dim() == 2 else v for name, v in values.items()})
        x = randn(*(SIZES[letter] for letter in layout["X"].letters), seed=1)
        dy = randn(*(SIZES[letter] for letter in layout["Y"].letters), seed=2)
        local = sg.shard(x, layout["X"], mesh).requires_grad_()
        rows = {letter: SIZES[letter] for letter in layout.rows}
        for _ in range(2):  # in the first call, ranks also compare what they see for the first time
            layer.zero_grad()
            local.grad = None
            with sg.trace_collectives() as traced:
                y = layer(local, rows)
                y.backward(sg.shard(dy, layout["Y"], mesh))
        x.requires_grad_()
        expected = plain(x)
        expected.backward(dy)
        torch.testing.assert_close(sg.unshard(y.detach(), layout["Y"], mesh), expected.detach(), rtol=1e-12, atol=1e-13)
        assert local.grad is not None
        torch.testing.assert_close(sg.unshard(local.grad, layout["X"], mesh), x.grad, rtol=1e-11, atol=1e-13)
        for name, parameter, how in sg.named_shardings(layer):
            right = plain.get_parameter(name).grad
            assert parameter.grad is not None
            assert right is not None
            found = whole(parameter.grad, how)
            torch.testing.assert_close(found.T if turn and found.dim() == 2 else found, right, rtol=1e-11, atol=1e-13)
        predicted = layer.collectives(rows, D)
        assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
            (event.operation, event.axis, event.bytes) for event in traced
        ), text


@distributed(world_size=2)
def test_features_may_be_several_letters_and_experts_a_batch(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    heads = sg.Linear(6, 15, layout="X[b,s,d] W[h/tp,k,d] -> Q[b,s,h/tp,k]", sizes={"h": 3}, mesh=mesh, dtype=D)
    assert heads.shardings()["weight"].shape == (3, 5, 6)
    x = randn(2, 4, 6, seed=1)
    y = sg.unshard(heads(x).detach(), heads.layout["Q"], mesh)
    p = {name: whole(q, how) for name, q, how in sg.named_shardings(heads)}
    torch.testing.assert_close(y, torch.einsum("bsd,hkd->bshk", x, p["weight"]) + p["bias"], rtol=1e-12, atol=1e-13)
    experts = sg.Linear(
        4, 5, layout="X[e/tp,n,d] W[e/tp,d,m] -> Y[e/tp,n,m] + B[e/tp,m]", sizes={"e": 3}, mesh=mesh, dtype=D
    )
    x = randn(3, 2, 4, seed=1)
    y = sg.unshard(experts(sg.shard(x, experts.layout["X"], mesh)).detach(), experts.layout["Y"], mesh)
    p = {name: whole(q, how) for name, q, how in sg.named_shardings(experts)}
    torch.testing.assert_close(y, x @ p["weight"] + p["bias"][:, None], rtol=1e-12, atol=1e-13)


@distributed(world_size=2)
def test_what_a_layout_cannot_be_is_refused_when_built(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    heads = "X[b,s,d] W[h/tp,k,d] -> Q[b,s,h/tp,k]"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"layout": heads}, r"out_features=15 .*: h=\?, k=\?"),
        ({"layout": heads, "sizes": {"h": 4}}, r"out_features=15 .*: h=4, k=\?"),
        ({"layout": heads, "sizes": {"h": 3, "k": 4}}, r"out_features=15 .*: h=3, k=4"),
        ({"layout": heads, "sizes": {"h": 3, "q": 4}}, r"sizes names 'q'"),
        ({"layout": heads, "sizes": {"h": 3}, "save_gathered": ("Z",)}, r"save_gathered: no operand 'Z'"),
        ({"layout": "X[e,n,d] W[e,d,m] -> Y[e,n,m]"}, r"a parameter carries 'e'"),
        ({"layout": "X[n,d/tp] W[d,m] -> Y[n,m]"}, r"illegal layout"),
        ({"layout": "X[n,d] W[d,m] -> Y[n,m] + B[m]", "bias": False}, r"adds a bias"),
    ]
    for arguments, message in wrong:
        with pytest.raises(sg.LayoutError, match=message):
            sg.Linear(6, 15, mesh=mesh, **arguments)
    with pytest.raises(sg.MeshError, match="no axis 'r'"):
        sg.Linear(6, 15, layout="X[n/r,d] W[d,m] -> Y[n/r,m]", mesh=mesh)


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("sequence_dim", [None, 0])
def test_megatrons_gather_output_and_whole_input(world_size: int, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(3)
    column = sg.ColumnParallelLinear(5, 7, mesh=mesh, gather_output=True, sequence_dim=sequence_dim, dtype=D)
    row = sg.RowParallelLinear(7, 6, mesh=mesh, input_is_parallel=False, sequence_dim=sequence_dim, dtype=D)
    plain = load_from(nn.Linear(5, 7, dtype=D), column), load_from(nn.Linear(7, 6, dtype=D), row)
    x, dy = randn(4, 3, 5, seed=1), randn(4, 3, 6, seed=2)
    stored, out = column.layout(3)["X"], row.layout(3)["Y"]
    local = sg.shard(x, stored, mesh).requires_grad_()
    for _ in range(2):  # in the first call, ranks also compare what they see for the first time
        column.zero_grad()
        row.zero_grad()
        local.grad = None
        with sg.trace_collectives() as traced:
            hidden = column(local, 4)
            hidden.retain_grad()
            y = row(hidden.softmax(-1))  # over all features, on every rank
            y.backward(sg.shard(dy, out, mesh))
    assert hidden.shape == (4, 3, 7)
    x.requires_grad_()
    expected_hidden = plain[0](x)
    expected_hidden.retain_grad()
    expected = plain[1](expected_hidden.softmax(-1))
    expected.backward(dy)
    torch.testing.assert_close(hidden.grad, expected_hidden.grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(sg.unshard(y.detach(), out, mesh), expected.detach(), rtol=1e-12, atol=1e-13)
    assert local.grad is not None
    torch.testing.assert_close(sg.unshard(local.grad, stored, mesh), x.grad, rtol=1e-11, atol=1e-13)
    assert_gradients_match(column, plain[0])
    assert_gradients_match(row, plain[1])
    predicted = [*column.collectives((4, 3, 5), D), *row.collectives((4, 3, 7), D)]
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
        (event.operation, event.axis, event.bytes) for event in traced
    )
    with pytest.raises(sg.ShapeError, match=r"takes x whole, \[..., 7\], not \(4, 3, 5\)"):
        row(torch.ones(4, 3, 5, dtype=D))


@distributed(world_size=2)
def test_constructors_refuse_what_forward_would(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for build in (sg.ColumnParallelLinear, sg.RowParallelLinear):
        with pytest.raises(sg.ShapeError, match="sequence_dim=-1 is not a row dim"):
            build(4, 6, mesh=mesh, sequence_dim=-1)
        with pytest.raises(sg.ShapeError, match="is the number of a dim, or None; not True"):
            build(4, 6, mesh=mesh, sequence_dim=True)
        with pytest.raises(
            sg.LayoutError, match=r"save_gathered names operands, as save_gathered=\('X',\), of X and W; not 'X'"
        ):
            build(4, 6, mesh=mesh, save_gathered="X")
        with pytest.raises(sg.LayoutError, match=r"not \('Y',\)"):
            build(4, 6, mesh=mesh, save_gathered=("Y",))
    for build in (sg.LayerNorm, sg.RMSNorm):
        with pytest.raises(sg.ShapeError, match="sequence_dim=-1 is not a row dim"):
            build(4, mesh=mesh, sequence_dim=-1)
    with pytest.raises(sg.ShapeError, match="sequence_dim=-1 is not a row dim"):
        sg.VocabParallelEmbedding(4, 6, mesh=mesh, sequence_dim=-1)


@distributed(world_size=2)
def test_layers_that_ran_are_copied_and_saved(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = nn.Sequential(
        sg.VocabParallelEmbedding(7, 4, mesh=mesh),
        sg.RMSNorm(4, mesh=mesh),
        sg.Attention(4, 2, num_kv_heads=1, rotary=sg.Rotary(2), mesh=mesh),
        sg.MLP(4, 5, mesh=mesh),
        sg.SwiGLU(4, 5, mesh=mesh),
        sg.Linear(4, 3, layout="X[b,s,d] W[m/tp,d] -> Y[b,s,m/tp]", mesh=mesh),
    )
    ids = torch.tensor([[0, 3, 6, 2]])
    y = model(ids)
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(kept, weights_only=False)):
        assert torch.equal(twin(ids), y)
        assert twin[5].weight is not model[5].weight


@distributed(world_size=2)
def test_a_frozen_weight_of_a_norm_is_not_reduced(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    x, dy = randn(3, 4, seed=1), randn(3, 4, seed=2)
    part = sg.Layout("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]")["X"]
    for frozen, elements in (((), 8), (("weight",), 4), (("bias",), 4), (("weight", "bias"), 0)):
        norm = sg.LayerNorm(4, mesh=mesh, sequence_dim=0, dtype=D)
        for name in frozen:
            norm.get_parameter(name).requires_grad_(False)
        local = sg.shard(x, part, mesh).requires_grad_()
        with sg.trace_collectives() as traced:
            norm(local).backward(sg.shard(dy, part, mesh))
        assert [prod(event.shape) for event in traced] == [elements][: bool(elements)]
        weight, bias = torch.ones(4, dtype=D).requires_grad_(), torch.zeros(4, dtype=D).requires_grad_()
        F.layer_norm(x, (4,), weight, bias).backward(dy)
        for name, right in (("weight", weight.grad), ("bias", bias.grad)):
            if name not in frozen:
                torch.testing.assert_close(norm.get_parameter(name).grad, right, rtol=1e-12, atol=1e-13)
