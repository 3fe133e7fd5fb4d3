"""Deferred weight gradients are those of an undeferred backward, to the bit, and so is what is communicated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.layout.layout import Layout
from shardgrad.layout.presets import PRESETS
from shardgrad.testing import distributed

SIZES = {"n": 5, "d": 7, "m": 6}
LAYOUTS = {name: str(PRESETS[name]) for name in ("column", "column_sequence", "row", "row_sequence")}
LAYOUTS["data parallel"] = "X[n/tp,d] W[d,m] -> Y[n/tp,m]"
LAYOUTS["fully sharded"] = "X[n/tp,d] W[d/tp,m] -> Y[n/tp,m]"


def grads_of(run: Callable[[], Tensor], leaves: list[nn.Parameter], dy: Tensor, defer: bool) -> list[Tensor | None]:
    for leaf in leaves:
        leaf.grad = None
    y = run()
    if defer:
        with sg.defer_weight_grads() as later:
            y.backward(dy)
        later.run()
    else:
        y.backward(dy)
    return [leaf.grad for leaf in leaves]


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(found, expected):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert bool(one.isfinite().all())
            assert torch.equal(one, other)


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("frozen", [None, "x", "w"])
def test_same_bits_and_same_bytes(world_size: int, name: str, frozen: str | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout(LAYOUTS[name])
    torch.manual_seed(3)
    shapes = [[SIZES[letter] for letter in spec.letters] for spec in (layout.lhs, layout.rhs, layout.out)]
    full = [torch.randn(shape) for shape in (*shapes, [SIZES[letter] for letter in layout.bias.letters])]
    x, w, dy, b = (sg.shard(t, spec, mesh) for t, spec in zip(full, (layout.lhs, layout.rhs, layout.out, layout.bias)))
    leaves = [nn.Parameter(t, requires_grad=what != frozen) for t, what in ((x, "x"), (w, "w"), (b, "b"))]

    def run() -> Tensor:
        return sg.matmul(leaves[0], leaves[1], layout, mesh, leaves[2], SIZES)

    with sg.trace_collectives() as usual:
        expected = grads_of(run, leaves, dy, defer=False)
    assert all(grad is not None for grad, leaf in zip(expected, leaves) if leaf.requires_grad)
    grads_of(run, leaves, dy, defer=True)
    with sg.trace_collectives() as traced:
        assert_same(grads_of(run, leaves, dy, defer=True), expected)
    assert traced.bytes <= usual.bytes
    assert {key: size for key, (_, size) in traced.totals().items()} == {
        key: size
        for key, (_, size) in usual.totals().items()
        if key[0] != "all-to-all"  # what was compared once
    }


@distributed(world_size=[1, 2, 3])
def test_only_dx_is_there_before_run_and_a_later_backward_adds(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(1)
    mlp = sg.MLP(6, 10, mesh=mesh, sequence_dim=0)
    mine = (
        5 // world_size + (5 % world_size > mesh.get_local_rank("tp"))
        if world_size != 3
        else (2, 2, 1)[mesh.get_rank()]
    )
    xs = [torch.randn(mine, 6, requires_grad=True) for _ in range(2)]
    dys = [torch.randn(mine, 6) for _ in range(2)]
    seen: list[Tensor | None] = []
    for parameter in mlp.parameters():
        parameter.register_hook(seen.append)
    for x, dy in zip(xs, dys):
        mlp(x).backward(dy)
    expected = [p.grad for p in mlp.parameters()]
    dxs = [x.grad for x in xs]
    mlp.zero_grad()
    seen.clear()
    with sg.defer_weight_grads() as later:
        for x, dy in zip(xs, dys):
            x.grad = None
            mlp(x).backward(dy)
            later.run()
            assert len(later) == 0
            assert x.grad is not None
    assert_same([x.grad for x in xs], dxs)
    assert_same([p.grad for p in mlp.parameters()], expected)
    assert len([grad for grad in seen if grad is not None]) == 2 * len(expected)
    mlp.zero_grad()
    with sg.defer_weight_grads() as later:
        mlp(xs[0]).backward(dys[0])
    assert len(later) == 2
    assert all(p.grad is None for p in mlp.parameters())
    later.run()
    assert all(p.grad is not None for p in mlp.parameters())


@distributed(world_size=[1, 2])
def test_a_weight_used_often(world_size: int) -> None:
    """The order in which three gradients are summed shows in the last bits."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 6))
    x, dy = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)

    def run() -> Tensor:
        y: Tensor = x
        for factor in (1.0, 3.1, 0.7):
            y = sg.matmul(y * factor, w, "X[n,d] W[d,m] -> Y[n,m]", mesh).tanh()
        return y

    expected = grads_of(run, [w], dy, defer=False)
    assert_same(grads_of(run, [w], dy, defer=True), expected)


@distributed(world_size=[1, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_that_are_no_leaves(world_size: int, autocast: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 6))
    x, dy = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    waiting = []

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return sg.matmul(x, w if autocast else w.t() * 1.3, "X[n,d] W[d,m] -> Y[n,m]", mesh).float()

    expected = grads_of(run, [w], dy, defer=False)
    assert_same(grads_of(run, [w], dy, defer=True), expected)
    with sg.defer_weight_grads() as later:
        run().backward(dy)
        waiting.append(len(later))
        later.run()
    assert waiting == [int(autocast)]


@distributed(world_size=[1, 2])
def test_products_of_one_input_and_an_unused_output(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    layouts = [Layout(f"X[n,d] W[d,{m}/tp] -> Y[n,{m}/tp]") for m in "pq"]
    ws = [nn.Parameter(torch.randn(6, 4)) for _ in layouts]
    x = nn.Parameter(torch.randn(5, 6))
    dy = torch.randn(5, 4)
    for used in ((0, 1), (1,)):

        def run(used: tuple[int, ...] = used) -> Tensor:
            ys = sg.matmul(x, list(zip(ws, layouts)), mesh)
            return torch.stack([ys[at] for at in used]).sum(0)

        expected = grads_of(run, [x, *ws], dy, defer=False)
        assert_same(grads_of(run, [x, *ws], dy, defer=True), expected)


@distributed(world_size=1)
def test_what_is_never_computed_is_said(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    w = nn.Parameter(torch.randn(6, 6))
    with sg.defer_weight_grads() as later:
        sg.matmul(torch.randn(5, 6), w, PRESETS["column"], mesh).sum().backward()
    holder = [later]
    del later
    with pytest.warns(RuntimeWarning, match=r"of 1 products were deferred and never computed: call later\.run"):
        holder.clear()
