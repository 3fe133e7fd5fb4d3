"""Derivatives of products beyond the first backward, on small integers, against torch's einsum of whole tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from exact import assert_same, integers
from layouts import grids, random_layout, random_sizes
from torch import Tensor, func
from torch.autograd.functional import hessian, hvp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad import PRESETS, Layout, TensorSpec
from shardgrad.testing import distributed

# torch's own, as it loads what forward mode needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
D = torch.float64


def third(call: Call, x: Tensor, w: Tensor, b: Tensor, dy: Tensor, along: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of X, W, B; those of these along given directions, of X, W, dY; and once more."""
    u, v, c, tx, tw, ty = along
    grads = torch.autograd.grad(call(x, w, b), (x, w, b), dy, create_graph=True)
    second = torch.autograd.grad(grads, (x, w, dy), (u, v, c), create_graph=True)
    return [*grads, *second, *torch.autograd.grad(second, (x, w, dy, u, v, c), (tx, tw, ty))]


def reverse(call: Call, x: Tensor, w: Tensor, b: Tensor, dy: Tensor, along: Sequence[Tensor]) -> list[Tensor]:
    """By torch.func: the gradients, those of their sum of squares; Y and the gradients of X, entry by entry."""
    x, w, b, dy, u, v = (each.detach() for each in (x, w, b, dy, *along[:2]))

    def gradients(x: Tensor, w: Tensor, dy: Tensor) -> Any:
        return func.vjp(call, x, w, b)[1](dy)

    made = func.vjp(gradients, x, w, dy)
    return [
        *made[0],
        *made[1]((u, v, along[2].detach())),
        *func.vmap(call, in_dims=(0, 0, None))(torch.stack([x, u]), torch.stack([w, v]), b).unbind(0),
        *func.vmap(gradients, in_dims=(None, 0, None))(x, torch.stack([w, v]), dy)[0].unbind(0),
    ]


def forward(call: Call, x: Tensor, w: Tensor, b: Tensor, dy: Tensor, along: Sequence[Tensor]) -> list[Tensor]:
    """In forward mode: the change of Y, by dual numbers and by torch.func, and that of the gradients."""
    x, w, b, dy, u, v, c, e = (each.detach() for each in (x, w, b, dy, *along[:3], along[5]))
    with fwd.dual_level():
        tangent = fwd.unpack_dual(call(fwd.make_dual(x, u), w, fwd.make_dual(b, c))).tangent
    changes = func.jvp(lambda x, w, dy: func.vjp(call, x, w, b)[1](dy), (x, w, dy), (u, v, e))[1]
    return [tangent, func.jvp(call, (x, w, b), (u, v, c))[1], *changes]


def check(layout: Layout, mesh: DeviceMesh, sizes: dict[str, int], seed: int, ways: Sequence[Any]) -> None:
    x, w, b, y = layout.lhs, layout.rhs, layout.bias, layout.out
    given = (x, w, b, y, x, w, b, x, w, y)
    whole = [integers(spec, sizes, 20 * seed + at, D).requires_grad_() for at, spec in enumerate(given)]
    local = [sg.shard(full.detach(), spec, mesh).requires_grad_() for full, spec in zip(whole, given)]
    index = {letter: chr(ord("a") + at) for at, letter in enumerate(layout.letters)}
    xs, ws, bs, ys = ("".join(index[letter] for letter in spec.letters) for spec in given[:4])

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ones = torch.ones([sizes[letter] for letter in y.letters], dtype=D)
        return torch.einsum(f"{xs},{ws}->{ys}", x, w) + torch.einsum(f"{bs},{ys}->{ys}", b, ones)

    def sharded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return sg.matmul(x, w, layout, mesh, bias=b, sizes=sizes)

    dx, dw, db = x.grad, w.grad, b.grad
    of: dict[Any, list[TensorSpec]] = {
        third: [dx, dw, db, dx, dw, y, dx, dw, y, dx, dw, db],
        reverse: [dx, dw, db, dx, dw, y, y, y, dx, dx],
        forward: [y, y, dx, dw, db],
    }
    for way, specs in ((way, of[way]) for way in ways):
        found, right = (way(call, *all_of[:4], all_of[4:]) for call, all_of in ((sharded, local), (plain, whole)))
        assert len(found) == len(right) == len(specs)
        for at, (one, expected, spec) in enumerate(zip(found, right, specs)):
            what = f"{way.__name__} {at} of {layout} with {sizes}"
            assert_same(one.detach(), spec, expected.detach(), mesh, sizes, what)


@distributed(world_size=2)
@pytest.mark.parametrize("name", ["column", "row_sequence", "fully_sharded"])
def test_published_layouts(world_size: int, name: str) -> None:
    layout = PRESETS[name]
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=layout.axes)
    check(layout, mesh, {"n": 5, "d": 3, "m": 7}, 1, (third, reverse))


@pytest.mark.slow
@distributed(world_size=[1, 2, 3, 4], timeout=300)
def test_random_legal_layouts(world_size: int) -> None:
    rng = random.Random(world_size)
    for dims in (1, 2):
        for grid in grids(world_size, dims):
            mesh = init_device_mesh("cpu", grid, mesh_dim_names=("p", "q")[:dims])
            for at in range(4):
                layout = random_layout(rng, ("p", "q")[:dims])
                check(layout, mesh, random_sizes(rng, layout), at, (third, reverse, forward))


@distributed(world_size=2)
def test_products_of_one_input_of_which_one_is_frozen(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layouts = "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]", "X[n/tp,d] V[d,m/tp] -> Z[n,m/tp]"
    x, w, v = (integers(Layout(PRESETS["column"].text).lhs, {"n": 4, "d": 4}, at, D) for at in range(3))
    spec = Layout(layouts[0])
    xl, wl = sg.shard(x, spec.lhs, mesh).requires_grad_(), sg.shard(w, spec.rhs, mesh).requires_grad_()
    vl = sg.shard(v, spec.rhs, mesh)
    x.requires_grad_()
    w.requires_grad_()
    for of_products in (torch.mul, lambda y, z: z.square()):  # the last does not use Y
        y, z = sg.matmul(xl, [(wl, layouts[0]), (vl, layouts[1])], mesh, sizes={"n": 4})
        found = torch.autograd.grad(of_products(y, z).sum(), xl, create_graph=True)[0]
        expected = torch.autograd.grad(of_products(x @ w, x @ v).sum(), x, create_graph=True)[0]
        again = torch.autograd.grad(found.square().sum(), (xl, wl), materialize_grads=True)
        wanted = torch.autograd.grad(expected.square().sum(), (x, w), materialize_grads=True)
        for one, whole, of in zip(again, wanted, (spec.lhs, spec.rhs)):
            assert torch.equal(one, sg.shard(whole, of, mesh))


@pytest.mark.slow
@distributed(world_size=1)
def test_finite_differences_agree(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    x, w, k = (torch.randn(2, 3, *more, dtype=D, requires_grad=True) for more in ((), (), (4,)))
    layout = Layout("X[n,d/tp] W[m,d/tp] -> Y[n,m]")
    windows = torch.randn(2, 3, 2, dtype=D, requires_grad=True)
    for call, inputs in (
        (lambda x, w: sg.matmul(x, w, layout, mesh), (x, w)),
        (lambda x, w: sg.convolve(x, w, "X[b,c/tp,h] W[o,c/tp,i] -> Y[b,o,p]", mesh, padding=1), (k, windows)),
    ):
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, inputs)


@distributed(world_size=2)
@pytest.mark.parametrize("name", ["save_gathered=", "sg.use_main_grads", "sg.defer_weight_grads", "per_piece"])
def test_what_has_no_second_derivative_raises_with_its_name(world_size: int, name: str) -> None:
    """None is zero in silence; the first derivative under create_graph=True is right all the same."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    save, at = (("X",), 0) if name == "save_gathered=" else ((), None)
    layer = sg.ColumnParallelLinear(4, 8, mesh=mesh, dtype=D, sequence_dim=at, save_gathered=save)
    if name == "sg.use_main_grads":
        sg.use_main_grads(layer.parameters(), D)
    call: Callable[[Tensor], Tensor] = sg.per_piece(torch.sin) if name == "per_piece" else lambda x: layer(x, 8)
    x = torch.randn(4, 4, dtype=D)
    leaf = x.clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return call(x).square().sum()

    def grad(**settings: bool) -> Tensor:
        return torch.autograd.grad(loss(leaf), leaf, **settings)[0]

    with sg.defer_weight_grads() if name == "sg.defer_weight_grads" else nullcontext() as later:
        for ask in (
            lambda: grad(create_graph=True).sum().backward(),
            lambda: grad(create_graph=True).sum().backward(inputs=[leaf]),
            lambda: torch.autograd.grad(grad(create_graph=True).sum(), leaf, allow_unused=True),
            lambda: hessian(loss, x),
            lambda: hvp(loss, x, torch.ones_like(x)),
        ):
            with pytest.raises(RuntimeError, match=rf"second derivative through .*{name} was asked for"):
                ask()
        assert torch.equal(grad(create_graph=True), grad())
    if later is not None:
        later.run()


@distributed(world_size=2)
def test_vmap_is_refused_where_shapes_depend_on_values(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    moe = sg.MoE(4, 3, 2, mesh=mesh, axis="tp", dtype=D)
    for call in (sg.per_piece(torch.sin), lambda x: moe(x)[0]):
        with pytest.raises(RuntimeError, match=r"(per_piece|MoE).* was reached inside torch.func"):
            func.vmap(call)(torch.ones(2, 4, 4, dtype=D))


@distributed(world_size=2)
def test_exact_mode(world_size: int) -> None:
    """A product has its second derivatives, to the bit as on other ranks; what is between products raises."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sg.set_exact(mesh, {"tp": 2})
    column, mlp = (kind(4, 8, mesh=mesh, dtype=D) for kind in (sg.ColumnParallelLinear, sg.MLP))
    x = integers(Layout(PRESETS["column"].text).lhs, {"n": 4, "d": 4}, 1, D)
    with torch.no_grad():
        column.weight.copy_(column.weight.mul(16).round())
    whole = torch.cat([sg.all_gather(column.weight, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), "tp", 0)])
    found = hvp(lambda x: (column(x) - column.bias).square().sum(), x, torch.ones_like(x))[1]
    assert torch.equal(found, 2 * torch.ones_like(x) @ whole.t() @ whole)
    with pytest.raises(RuntimeError, match="second derivative through a tensor cut into pieces"):
        hvp(lambda x: mlp(x).square().sum(), x, torch.ones_like(x))
    for call in (column, sg.LayerNorm(4, mesh=mesh, sequence_dim=0, dtype=D), sg.per_piece(torch.sin)):
        with pytest.raises((sg.LayoutError, RuntimeError), match=r"torch\.func"):
            func.grad(lambda x, call=call: call(x).sum())(x)
    ids = torch.tensor([0, 1, 2, 3])
    with pytest.raises(sg.LayoutError, match="second derivative of a loss"):
        hvp(lambda x: sg.vocab_parallel_cross_entropy(x, ids, vocab_size=8, mesh=mesh), x, torch.ones_like(x))
