"""Attention and feed-forward side by side, against the same two with their own reductions on one device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from plain import load_from, randn, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed

D = torch.float64
BATCH, SEQUENCE, WIDTH = 2, 5, 12


def gptj(
    mesh: DeviceMesh, sequence_dim: int | None, reduce: bool = False, data: sg.BatchAxis | None = None
) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        sg.LayerNorm(WIDTH, mesh=mesh, sequence_dim=sequence_dim, data=data, dtype=D),
        sg.Attention(WIDTH, 3, mesh=mesh, reduce=reduce, data=data, dtype=D),
        sg.MLP(WIDTH, 7, mesh=mesh, reduce=reduce, data=data, dtype=D),
    )


def palm(mesh: DeviceMesh, sequence_dim: int | None, reduce: bool = False) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        sg.RMSNorm(WIDTH, mesh=mesh, sequence_dim=sequence_dim, dtype=D),
        sg.Attention(
            WIDTH, 6, num_kv_heads=2, head_dim=4, bias=False, rotary=sg.Rotary(4), mesh=mesh, reduce=reduce, dtype=D
        ),
        sg.SwiGLU(WIDTH, 7, mesh=mesh, reduce=reduce, dtype=D),
    )


PARTS = {"gptj": gptj, "palm": palm}


def randomized(block: nn.Module) -> nn.Module:
    """Every parameter, norms and biases too, random."""
    for at, (_, parameter, sharding) in enumerate(sg.named_shardings(block)):
        assert sharding is not None
        with torch.no_grad():
            parameter.copy_(sg.shard(0.5 * randn(*sharding.shape, seed=20 + at), sharding.spec, sharding.mesh))
    return block


def by_torch(x: Tensor, p: dict[str, Tensor], kind: str) -> Tensor:
    if kind == "gptj":
        n = F.layer_norm(x, (WIDTH,), p["norm.weight"], p["norm.bias"])
        hidden = F.gelu(F.linear(n, p["mlp.up.weight"], p["mlp.up.bias"]))
        mlp = F.linear(hidden, p["mlp.down.weight"], p["mlp.down.bias"])
    else:
        n = F.rms_norm(x, (WIDTH,), p["norm.weight"])
        hidden = F.silu(F.linear(n, p["mlp.gate_weight"])) * F.linear(n, p["mlp.up_weight"])
        mlp = F.linear(hidden, p["mlp.down_weight"])
    qkv = []
    for name in ("query", "key", "value"):
        weight = p[f"attention.{name}_weight"]
        heads = F.linear(n, weight.flatten(0, 1), p[f"attention.{name}_bias"].flatten() if kind == "gptj" else None)
        heads = heads.unflatten(-1, weight.shape[:2])
        if kind == "palm" and name != "value":  # rotary, as Llama writes it
            angle = torch.arange(x.shape[1], dtype=D)[:, None] * 10000.0 ** (-torch.tensor([0.0, 2.0], dtype=D) / 4)
            cos, sin = (torch.cat((f(angle),) * 2, -1)[:, None] for f in (torch.cos, torch.sin))
            heads = heads * cos + torch.cat((-heads[..., 2:], heads[..., :2]), -1) * sin
        qkv.append(heads.transpose(1, 2).repeat_interleave((3 if kind == "gptj" else 6) // weight.shape[0], 1))
    a = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2)
    y = F.linear(a, p["attention.output_weight"].flatten(1), p["attention.output_bias"] if kind == "gptj" else None)
    return x + y + mlp


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("kind", list(PARTS))
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_equals_one_device_and_sends_what_it_predicts(world_size: int, kind: str, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    block = sg.ParallelBlock(*PARTS[kind](mesh, sequence_dim))
    randomized(block)
    stored = sg.Layout("X[b,s/tp,d] W[d,m/tp] -> Y[b,s,m/tp]" if sequence_dim else "X[b,s,d] W[d,m] -> Y[b,s,m]")["X"]
    x, dy = randn(BATCH, SEQUENCE, WIDTH, seed=1), randn(BATCH, SEQUENCE, WIDTH, seed=2)
    local = sg.shard(x, stored, mesh).requires_grad_()
    for _ in range(2):  # in the first call, ranks also compare what they see for the first time
        block.zero_grad()
        local.grad = None
        with sg.trace_collectives() as traced:
            y = block(local, SEQUENCE)
            y.backward(sg.shard(dy, stored, mesh))
    params = {name: whole(p, how).requires_grad_() for name, p, how in sg.named_shardings(block)}
    x.requires_grad_()
    expected = by_torch(x, params, kind)
    expected.backward(dy)
    torch.testing.assert_close(sg.unshard(y.detach(), stored, mesh), expected.detach(), rtol=1e-12, atol=1e-13)
    assert local.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(sg.unshard(local.grad, stored, mesh), x.grad, rtol=1e-11, atol=1e-12)
    largest = max(float(p.grad.abs().max()) for p in params.values() if p.grad is not None)
    for name, parameter, how in sg.named_shardings(block):
        assert parameter.grad is not None, name
        right = params[name].grad
        torch.testing.assert_close(
            whole(parameter.grad, how), right, rtol=1e-11, atol=1e-13 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
    predicted = block.collectives(BATCH, SEQUENCE, D)
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
        (event.operation, event.axis, event.bytes) for event in traced
    )


@distributed(world_size=[2, 4])
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_data_parallel_replicas_take_their_part_of_the_batch(world_size: int, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    data = sg.BatchAxis("dp")
    block = randomized(sg.ParallelBlock(*gptj(mesh, sequence_dim, data=data)))
    s = "s/tp" if sequence_dim else "s"
    stored = sg.Layout(f"X[b/dp,{s},d] W[d,m] -> Y[b/dp,{s},m]")["X"]
    x, dy = randn(3, SEQUENCE, WIDTH, seed=1), randn(3, SEQUENCE, WIDTH, seed=2)
    for _ in range(2):  # in the first call, ranks also compare what they see for the first time
        block.zero_grad()
        with sg.trace_collectives() as traced:
            y = block(sg.shard(x, stored, mesh).requires_grad_(), SEQUENCE)
            y.backward(sg.shard(dy, stored, mesh))
    params = {name: whole(p, how).requires_grad_() for name, p, how in sg.named_shardings(block)}
    expected = by_torch(x, params, "gptj")
    expected.backward(dy)
    torch.testing.assert_close(sg.unshard(y.detach(), stored, mesh), expected.detach(), rtol=1e-12, atol=1e-13)
    largest = max(float(p.grad.abs().max()) for p in params.values() if p.grad is not None)
    for name, parameter, how in sg.named_shardings(block):
        assert parameter.grad is not None, name
        torch.testing.assert_close(whole(parameter.grad, how), params[name].grad, rtol=1e-11, atol=1e-13 * largest)
    predicted = block.collectives(3, SEQUENCE, D)  # 2 sequences here, 1 there
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted if c.bytes) == sorted(
        (event.operation, event.axis, event.bytes) for event in traced if event.bytes
    )
    _, attention, mlp = gptj(mesh, sequence_dim, data=data)
    with pytest.raises(sg.LayoutError, match=r"norm has data=None, attention data=BatchAxis"):
        sg.ParallelBlock(gptj(mesh, sequence_dim)[0], attention, mlp)


@distributed(world_size=[2, 3])
def test_reduces_once_where_two_layers_reduce_twice(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    block = sg.ParallelBlock(*gptj(mesh, 1))
    counts = Counter((c.phase, c.operation) for c in block.collectives(BATCH, SEQUENCE))
    assert counts == {
        ("forward", "all-gather"): 1,
        ("forward", "reduce-scatter"): 1,
        ("dN", "all-gather"): 1,
        ("dN", "reduce-scatter"): 1,
        ("dW", "all-reduce"): 1,  # of the norm's weight and bias, whose rows are sharded
    }


@distributed(world_size=[2, 3, 4])
def test_the_terms_add_up_by_hand_as_well(world_size: int) -> None:
    """Linear layers that leave sums to the caller: two of them, one reduction each way."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    ups = [sg.ColumnParallelLinear(5, 7, mesh=mesh, reduce=False, dtype=D) for _ in range(2)]
    downs = [sg.RowParallelLinear(7, 3, mesh=mesh, reduce=False, dtype=D) for _ in range(2)]
    plain = [load_from(nn.Linear(u.in_features, u.out_features, dtype=D), u) for u in (*ups, *downs)]
    x, dy = randn(4, 5, seed=1), randn(4, 3, seed=2)
    local = x.clone().requires_grad_()
    with sg.trace_collectives() as traced:
        shared = sg.replicate(local, mesh)
        y = sg.all_reduce(downs[0](ups[0](shared).sin()) + downs[1](ups[1](shared).cos()), mesh)
        y.backward(dy)
    assert [event.operation for event in traced if event.dtype == "float64"] == ["all-reduce"] * 2
    x.requires_grad_()
    expected = plain[2](plain[0](x).sin()) + plain[3](plain[1](x).cos())
    expected.backward(dy)
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(local.grad, x.grad, rtol=1e-11, atol=1e-13)
    for layer, reference in zip((*ups, *downs), plain):
        for name, parameter, how in sg.named_shardings(layer):
            assert parameter.grad is not None
            torch.testing.assert_close(
                whole(parameter.grad, how), reference.get_parameter(name).grad, rtol=1e-11, atol=1e-13
            )


@distributed(world_size=2)
def test_wrong_parts_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "other"))
    norm, attention, mlp = gptj(mesh, 1)
    with pytest.raises(sg.LayoutError, match="build attention with reduce=False"):
        sg.ParallelBlock(norm, gptj(mesh, 1, reduce=True)[1], mlp)
    with pytest.raises(sg.LayoutError, match="build mlp with reduce=False"):
        sg.ParallelBlock(norm, attention, gptj(mesh, 1, reduce=True)[2])
    with pytest.raises(sg.LayoutError, match="norm is over axis 'other', attention over 'tp'"):
        sg.ParallelBlock(sg.RMSNorm(WIDTH, mesh=mesh, axis="other"), attention, mlp)
    with pytest.raises(sg.ShapeError, match="sequence_dim of its norm is 1 or None, not 0"):
        sg.ParallelBlock(sg.RMSNorm(WIDTH, mesh=mesh, sequence_dim=0), attention, mlp)
    for build in (sg.ColumnParallelLinear, sg.RowParallelLinear, sg.SwiGLU, sg.MLP):
        with pytest.raises(sg.LayoutError, match=r"with reduce=False .* leave out sequence_dim=0"):
            build(4, 6, mesh=mesh, reduce=False, sequence_dim=0)
