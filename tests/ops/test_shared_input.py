"""Several weights in one product: what they share is gathered and reduced once."""

from __future__ import annotations

import torch
from exact import assert_same, integers, reference
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad import Layout
from shardgrad.testing import distributed


@distributed(world_size=[1, 2, 3, 4])
def test_weights_that_share_an_input_share_its_gather_and_reduction(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    texts = (
        "X[b,s/tp,d] Wq[h/tp,k,d] -> Q[b,s,h/tp,k] + Bq[h/tp,k]",
        "X[b,s/tp,d] Wk[d,j/tp] -> K[b,s,j/tp]",
        "X[b,s/tp,d] Wv[d,v/tp] -> V[v/tp,b,s] + Bv[v/tp]",
    )
    sizes = {"b": 2, "s": 5, "d": 3, "h": 5, "k": 2, "j": 7, "v": 4}
    layouts = [Layout(text) for text in texts]
    x = integers(layouts[0].lhs, sizes, 1)
    total = torch.zeros_like(x)
    weights, expected, dys = [], [], []
    for at, layout in enumerate(layouts):
        own = {letter: sizes[letter] for letter in layout.letters}
        w, b, dy = (integers(t, own, 10 * at + i) for i, t in enumerate((layout.rhs, layout.bias, layout.out)))
        truth = reference(layout, x, w, b if layout.has_bias else None, dy)
        total += truth["dX"]
        expected.append(truth)
        dys.append(dy)
        ws, bs = sg.shard(w, layout.rhs, mesh).requires_grad_(), sg.shard(b, layout.bias, mesh).requires_grad_()
        weights.append((ws, layout, bs) if layout.has_bias else (ws, str(layout)))
    xs = sg.shard(x, layouts[0].lhs, mesh).requires_grad_()
    for _ in range(2):
        for tensor in (xs, *[t for entry in weights for t in entry if isinstance(t, torch.Tensor)]):
            tensor.grad = None
        with sg.trace_collectives() as traced:
            ys = sg.matmul(xs, weights, mesh, sizes={letter: sizes[letter] for letter in "bs"})
            torch.autograd.backward(ys, [sg.shard(dy, lay.out, mesh) for dy, lay in zip(dys, layouts)])
    operations = [event.operation for event in traced]
    assert operations == (["all-gather", "all-gather", "reduce-scatter"] if world_size > 1 else [])
    assert xs.grad is not None
    assert_same(xs.grad, layouts[0].lhs, total, mesh, sizes, "summed dX")
    for y, truth, layout, entry in zip(ys, expected, layouts, weights):
        assert_same(y, layout.out, truth["Y"], mesh, sizes, str(layout.out))
        assert_same(entry[0].grad, layout.rhs, truth["dW"], mesh, sizes, f"d{layout.rhs}")
        if layout.has_bias:
            assert_same(entry[2].grad, layout.bias, truth["db"], mesh, sizes, f"d{layout.bias}")


@distributed(world_size=[2, 4])
def test_sharing_an_input_that_one_weight_uses_split_and_another_replicated(world_size: int) -> None:
    """Fewer KV heads than ranks, say: dX of the replicated weight is complete and must not be summed over tp."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layouts = [Layout("X[n,d] Wq[d,q/tp] -> Q[n,q/tp]"), Layout("X[n,d] Wk[d,k] -> K[n,k]")]
    sizes = {"n": 3, "d": 4, "q": 6, "k": 5}
    x = integers(layouts[0].lhs, sizes, 3)
    xs = sg.shard(x, layouts[0].lhs, mesh).requires_grad_()
    weights, dys, total = [], [], torch.zeros_like(x)
    for at, layout in enumerate(layouts):
        w, dy = integers(layout.rhs, sizes, 4 + at), integers(layout.out, sizes, 6 + at)
        total += reference(layout, x, w, None, dy)["dX"]
        weights.append((sg.shard(w, layout.rhs, mesh).requires_grad_(), layout))
        dys.append(sg.shard(dy, layout.out, mesh))
    torch.autograd.backward(sg.matmul(xs, weights, mesh), dys)
    assert xs.grad is not None
    assert_same(xs.grad, layouts[0].lhs, total, mesh, sizes, "dX")


@distributed(world_size=[1, 2, 3])
def test_plain_matrices_that_share_an_input(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layouts = [Layout(f"X[n,d] W[d,{m}/tp] -> Y[n,{m}/tp]") for m in "pqr"]
    sizes = {"n": 3, "d": 4, "p": 6, "q": 5, "r": 7}
    x = integers(layouts[0].lhs, sizes, 3)
    xs = x.clone().requires_grad_()
    weights, dys, total = [], [], torch.zeros_like(x)
    for at, layout in enumerate(layouts):
        w, dy = integers(layout.rhs, sizes, 4 + at), integers(layout.out, sizes, 8 + at)
        total += reference(layout, x, w, None, dy)["dX"]
        weights.append((sg.shard(w, layout.rhs, mesh), layout))
        dys.append(sg.shard(dy, layout.out, mesh))
    torch.autograd.backward(sg.matmul(xs, weights, mesh), dys)
    assert xs.grad is not None
    assert torch.equal(xs.grad, total)


@distributed(world_size=2)
def test_outputs_that_nobody_uses_are_not_differentiated(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layouts = [Layout("X[n,d] A[d,p/tp] -> P[n,p/tp]"), Layout("X[n,d] B[d,q/tp] -> Q[n,q/tp]")]
    x = torch.ones(2, 3, requires_grad=True)
    a, b = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    p, _ = sg.matmul(x, [(a, layouts[0]), (b, layouts[1])], mesh)
    p.sum().backward()
    assert b.grad is None
    assert a.grad is not None
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 3), 4.0))
