"""The mixture of experts against a loop over tokens on one device, in float64; what it sends, counted row by row."""

from __future__ import annotations

import pytest
import torch
from plain import randn, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.layout.cost import sent
from shardgrad.layout.sizes import chunk
from shardgrad.nn import init
from shardgrad.testing import distributed

D = torch.float64
TOKENS = (5, 0, 8, 3)  # of each rank


def by_hand(x: Tensor, p: dict[str, Tensor], layer: sg.MoE) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, balance and choices, token by token."""
    probabilities = (x @ p["router"].T).softmax(-1)
    rows, chosen = [], []
    for token, probability in zip(x, probabilities):
        best = torch.argsort(probability, descending=True)[: layer.top_k]
        gates = probability[best]
        if layer.normalize:
            gates = gates / gates.sum()
        out = torch.zeros_like(token)
        for gate, expert in zip(gates, best):
            hidden = p["up"][expert] @ token
            if layer.gated:
                gated = p["gate"][expert] @ token
                hidden = gated * torch.sigmoid(gated) * hidden
            else:
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            out = out + gate * (p["down"][expert] @ hidden)
        rows.append(out)
        chosen.append(best)
    choices = torch.stack(chosen)
    share = torch.bincount(choices.flatten(), minlength=layer.num_experts).to(D) / choices.numel()
    return torch.stack(rows), layer.num_experts * (share * probabilities.mean(0)).sum(), choices


def run(layer: sg.MoE, world_size: int, tokens: tuple[int, ...], skew: float = 0.0) -> None:
    mesh = layer.mesh
    rank = mesh.get_local_rank("ep")
    for at, (name, parameter, sharding) in enumerate(sg.named_shardings(layer)):
        assert sharding is not None
        full = randn(*sharding.shape, seed=at)
        if name == "router":
            full[-1] += skew  # with positive tokens, everyone's first choice
        with torch.no_grad():
            parameter.copy_(sg.shard(full, sharding.spec, mesh))
    count, d = sum(tokens), layer.embed_dim
    x = randn(count, d, seed=21)
    if skew:
        x = x.abs()
    dy = randn(count, d, seed=22)
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    local = x[mine].clone().requires_grad_()
    layer(local)  # ranks compare what they mean
    with sg.trace_collectives() as traced:
        y, balance = layer(local)
        ((y * dy[mine]).sum() + 3 * balance).backward()
    params = {n: whole(p, sharding).requires_grad_() for n, p, sharding in sg.named_shardings(layer)}
    x.requires_grad_()
    right, right_balance, choices = by_hand(x, params, layer)
    ((right * dy).sum() + 3 * right_balance).backward()
    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(y, right[mine].detach(), **close)
    torch.testing.assert_close(balance, right_balance.detach(), **close)
    assert local.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(local.grad, x.grad[mine], **close)
    for name, parameter, sharding in sg.named_shardings(layer):
        assert parameter.grad is not None, name
        grad = params[name].grad
        assert grad is not None
        torch.testing.assert_close(whole(parameter.grad, sharding), grad, msg=lambda m, n=name: f"{n}: {m}", **close)
    if skew:
        assert bool((choices == layer.num_experts - 1).any(1).all())
    if world_size == 1:
        assert len(traced) == 0
        return
    e = layer.num_experts
    owner = [r for r in range(world_size) for _ in range(chunk(e, view(mesh).shape["ep"], r)[1])]
    home = [r for r in range(world_size) for _ in range(tokens[r])]
    pairs = [(home[at], owner[int(expert)]) for at, row in enumerate(choices) for expert in row]
    out = sum(source == rank != target for source, target in pairs) * d * 8
    back = sum(source != rank == target for source, target in pairs) * d * 8
    expected = [("all-to-all", (world_size - 1) * e * 8)]
    expected += [("all-to-all", n) for n in (out, back, back, out)]
    expected += [("all-reduce", sent("all-reduce", n, world_size, rank) * 8) for n in (e, e * d)]
    assert sorted((event.operation, event.bytes) for event in traced) == sorted(expected)


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("experts", [3, 5, 8])
def test_equals_a_loop_over_tokens(world_size: int, experts: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    for top_k, gated, normalize in ((2, True, True), (1, False, False), (3, True, False), (2, False, True)):
        layer = sg.MoE(6, 7, experts, top_k, mesh=mesh, gated=gated, normalize=normalize, dtype=D)
        run(layer, world_size, TOKENS[:world_size])


@distributed(world_size=[1, 2, 4])
def test_all_tokens_on_one_expert_and_fewer_experts_than_ranks(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    run(sg.MoE(4, 3, 6, 1, mesh=mesh, normalize=False, dtype=D), world_size, (7, 2, 0, 4)[:world_size], skew=60.0)
    run(sg.MoE(4, 3, 1, 1, mesh=mesh, normalize=False, dtype=D), world_size, (7, 2, 0, 4)[:world_size])
    run(sg.MoE(4, 3, 3, 3, mesh=mesh, dtype=D), world_size, (3, 9, 1, 0)[:world_size])


@distributed(world_size=[1, 3])
def test_no_token_at_all_frozen_inputs_and_leading_dims(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    layer = sg.MoE(4, 3, 5, mesh=mesh)
    y, balance = layer(torch.ones(0, 4))
    (y.sum() + balance).backward()
    assert y.shape == (0, 4)
    assert float(balance.detach()) == 0
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert not bool(parameter.grad.any())
    x = torch.randn(2, 3, 4)  # needs no gradient
    y, balance = layer(x)
    (y.sum() + balance).backward()
    flat, same = layer(x.view(6, 4))
    assert torch.equal(y.view(6, 4), flat)
    assert torch.equal(balance, same)
    half, _ = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    error, largest = (half.float() - y).abs().max().detach(), y.abs().max().detach()
    assert bool(error < 0.1 * largest)


@distributed(world_size=[1, 2, 3])
def test_values_do_not_depend_on_the_ranks(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    torch.manual_seed(3)
    layer = sg.MoE(4, 6, 5, mesh=mesh, dtype=D)
    bounds = {"router": 4**-0.5, "gate": 4**-0.5, "up": 4**-0.5, "down": 6**-0.5}
    state = sg.state_dict(layer)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "router": (5, 4),
        "gate": (5, 6, 4),
        "up": (5, 6, 4),
        "down": (5, 4, 6),
    }
    for name, value in state.items():
        assert 0.8 * bounds[name] < float(value.abs().max()) <= bounds[name]
    torch.manual_seed(3)
    seeds = [init.draw_seed() for _ in range(4)]  # router, gate, up, down
    assert torch.equal(state["up"], init.uniform(4**-0.5, seeds[2], (5, 6, 4), (0, 0, 0), (5, 6, 4)))
    assert "num_experts=5, top_k=2" in repr(layer)


@distributed(world_size=2)
def test_wrong_uses_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    for arguments in ((4, 4, 3, 4), (4, 4, 3, 0), (0, 4, 3, 1), (4, 4, 0, 1)):
        with pytest.raises(sg.ShapeError, match=r"top_k=. between 1 and num_experts"):
            sg.MoE(*arguments, mesh=mesh)
    with pytest.raises(sg.ShapeError, match=r"x is \[..., 4\], not \(2, 5\)"):
        sg.MoE(4, 4, 3, mesh=mesh)(torch.ones(2, 5))
    with pytest.raises(sg.MeshError, match="no axis 'experts' of MoE"):
        sg.MoE(4, 4, 3, mesh=mesh, axis="experts")
