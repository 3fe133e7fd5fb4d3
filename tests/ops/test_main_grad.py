"""Gradients added straight to main_grad are the sums of those that autograd would have returned."""

from __future__ import annotations

import pytest
import torch
from exact import integers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.layout.layout import Layout
from shardgrad.layout.presets import PRESETS
from shardgrad.testing import distributed

ALL = {"b": 3, "n": 5, "d": 7, "m": 6}
LAYOUTS = {name: str(PRESETS[name]) for name in ("column", "column_sequence", "row", "row_sequence")}
LAYOUTS["data parallel"] = "X[n/tp,d] W[d,m] -> Y[n/tp,m]"
LAYOUTS["fully sharded"] = "X[n/tp,d] W[d/tp,m] -> Y[n/tp,m]"
LAYOUTS["torch's weight, three dims"] = "X[b,n,d] W[m/tp,d] -> Y[b,n,m/tp]"
LAYOUTS["an order without a short form"] = "X[b,n,d] W[n,m/tp,d] -> Y[b,m/tp]"


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_micro_batches(world_size: int, name: str, dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout(LAYOUTS[name])
    specs = (layout.lhs, layout.rhs, layout.out, layout.bias)
    sizes = {letter: size for letter, size in ALL.items() if any(letter in spec.letters for spec in specs)}
    leaves = []
    for seed, spec in enumerate(specs[:2] + specs[3:]):
        leaves.append(nn.Parameter(sg.shard(integers(spec, sizes, seed), spec, mesh).to(dtype)))
    x, w, b = leaves
    dys = [sg.shard(integers(layout.out, sizes, seed), layout.out, mesh).to(dtype) for seed in (7, 8)]
    expected = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
    for dy in dys:
        sg.matmul(x, w, layout, mesh, b, sizes).backward(dy)
        for leaf, total in zip(leaves, expected):
            assert leaf.grad is not None
            total += leaf.grad
            leaf.grad = None
    assert any(bool((total != 0).any()) for total in expected)
    for defer in (False, True):
        buffers = sg.use_main_grads(leaves)
        assert [buffer.dtype for buffer in buffers] == [torch.float32] * 3
        for dy in dys:
            y = sg.matmul(x, w, layout, mesh, b, sizes)
            if defer:
                with sg.defer_weight_grads() as later:
                    y.backward(dy)
                later.run()
            else:
                y.backward(dy)
            assert all(leaf.grad is None for leaf in leaves)
        for buffer, total in zip(buffers, expected):
            assert torch.equal(buffer, total)
            buffer.zero_()


@distributed(world_size=[1, 2])
def test_a_block_with_a_tied_weight_and_a_frozen_one(world_size: int) -> None:
    """A weight used twice and parameters of norms, whose gradients autograd hands on, end in the same place."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    mlp, norm = sg.MLP(6, 10, mesh=mesh), sg.LayerNorm(6, mesh=mesh)
    x, dy = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    for module in (mlp, norm):
        module.double()
    mlp.up.bias.requires_grad_(False)
    parameters = [*mlp.parameters(), *norm.parameters()]

    def run() -> None:
        mlp(norm(mlp(norm(x)))).backward(dy)

    run()
    expected = [parameter.grad for parameter in parameters]
    mlp.zero_grad()
    norm.zero_grad()
    buffers = iter(sg.use_main_grads(parameters, torch.float64))
    run()
    for parameter, grad in zip(parameters, expected):
        assert parameter.grad is None
        assert (grad is None) == (not parameter.requires_grad)
        if grad is not None:
            buffer = next(buffers)
            assert buffer is parameter.main_grad
            # One addition is fused with the product, which is one rounding apart.
            assert torch.allclose(buffer, grad, rtol=1e-13, atol=1e-13)
    assert next(buffers, None) is None
