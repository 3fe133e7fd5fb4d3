"""The product on real ranks: every gradient equal to the reference on integers, everything sent as predicted."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from exact import assert_same, check, integers, reference
from layouts import grids, random_layout, random_sizes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad import PRESETS, Layout
from shardgrad.testing import distributed


@cache
def mesh_of(grid: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", grid, mesh_dim_names=names)


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_published_layouts_on_every_grid(world_size: int, name: str) -> None:
    layout = PRESETS[name]
    rng = random.Random(name)
    for grid in grids(world_size, len(layout.axes)):
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=layout.axes)
        for at in range(4):
            check(layout, mesh, random_sizes(rng, layout), seed=at, bias=at % 2 == 0, give_sizes=at < 2)


@distributed(world_size=[1, 2, 3, 4], timeout=120)
@pytest.mark.parametrize("seed", range(3))
def test_random_legal_layouts(world_size: int, seed: int) -> None:
    rng = random.Random(1000 * world_size + seed)
    for dims in (1, 2, 3):
        axes = ("p", "q", "r")[:dims]
        for grid in grids(world_size, dims):
            mesh = init_device_mesh("cpu", grid, mesh_dim_names=axes)
            for at in range(8):
                layout = random_layout(rng, axes)
                check(
                    layout,
                    mesh,
                    random_sizes(rng, layout),
                    seed=at,
                    bias=layout.has_bias or rng.random() < 0.5,
                    give_sizes=rng.random() < 0.5,
                    save_gathered=rng.choice([(), ("X",), ("W",), ("X", "W")]),
                    frozen=tuple(name for name in "XWB" if rng.random() < 0.15),
                )


@distributed(world_size=8, timeout=120)
def test_three_axes_nested_on_eight_ranks() -> None:
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("a", "b", "c"))
    rng = random.Random(8)
    texts = [
        "X[n/a/b/c,d] W[d,m] -> Y[n/a/b/c,m]",
        "X[n/a/b/c,d] W[d/a/b/c,m] -> Y[n/a/b/c,m]",
        "X[n/c/b/a,d] W[d,m/c/b/a] -> Y[n,m/c/b/a]",
        "X[n,d/a/b/c] W[d/a/b/c,m] -> Y[n/c/a/b,m]",
        str(PRESETS["3d"]),
    ]
    for at, text in enumerate(texts):
        layout = Layout(text)
        sizes = random_sizes(rng, layout) if at % 2 else dict(zip(layout.letters, (11, 13, 5)))
        check(layout, mesh, sizes, seed=at, bias=True, give_sizes=at % 2 == 0)


@distributed(world_size=[2, 3])
@pytest.mark.parametrize(
    "text",
    [
        "X[d] W[d,m/tp] -> Y[m/tp]",
        "X[d/tp] W[m,d/tp] -> Y[m]",
        "X[b,s/tp,d] W[f/tp,d] -> Y[b,s,f/tp]",
        "X[a,b,s/tp,d] W[d,g,f/tp] -> Y[a,b,s,g,f/tp]",
        "X[d/tp] W[d/tp] -> Y[]",
        "X[n/tp] W[m] -> Y[n/tp,m]",
        "X[b,s,h/tp,k] W[h/tp,k,d] -> Y[b,s/tp,d] + B[d]",
    ],
)
def test_from_one_to_four_dims_and_torchs_weight(world_size: int, text: str) -> None:
    layout = Layout(text)
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    check(layout, mesh, dict(zip(layout.letters, (5, 7, 4, 3, 2, 6))), give_sizes=False)


@distributed(world_size=[1, 2, 3, 4])
def test_non_contiguous_operands_and_gradients_and_expanded_ones(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    sizes = {"n": 5, "d": 7, "m": 6}
    for text in (
        "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]",
        "X[n,d/tp] W[d/tp,m] -> Y[n,m/tp]",
        "X[n,d/tp] W[d/tp,m] -> Y[n,m]",
    ):
        layout = Layout(text)
        x, w, b, dy = (integers(t, sizes, at) for at, t in enumerate((*layout.tensors[:2], layout.bias, layout.out)))
        dy[:] = dy[:1]  # rows alike, so that an expanded gradient says the same
        expected = reference(layout, x, w, b, dy)

        def strided(full: torch.Tensor, spec: sg.TensorSpec) -> torch.Tensor:
            local = sg.shard(full, spec, mesh)
            apart = local.new_full((*local.shape, 2), float("nan"))
            apart[..., 0] = local
            return apart[..., 0].detach().requires_grad_()

        xs, ws, bs = strided(x, layout.lhs), strided(w, layout.rhs), strided(b, layout.bias)
        assert not xs.is_contiguous() or xs.numel() < 2
        y = sg.matmul(xs, ws, layout, mesh, bias=bs)
        grad = sg.shard(dy, layout.out, mesh)
        y.backward(grad[:1].expand_as(grad) if grad.shape[0] else grad)
        assert_same(y, layout.out, expected["Y"], mesh, sizes, "Y")
        for tensor, spec, key in ((xs, layout.lhs, "dX"), (ws, layout.rhs, "dW"), (bs, layout.bias, "db")):
            assert tensor.grad is not None
            assert_same(tensor.grad, spec, expected[key], mesh, sizes, key)


@distributed(world_size=[1, 2, 3])
def test_one_tensor_used_twice_and_as_both_operands(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    column = Layout("X[n,d] W[d,m/tp] -> Y[n,m/tp]")
    sizes = {"n": 5, "d": 4, "m": 7}
    x, w, _, dy = (integers(t, sizes, at) for at, t in enumerate((*column.tensors[:2], column.bias, column.out)))
    expected = reference(column, x, w, None, dy)
    xs, ws = sg.shard(x, column.lhs, mesh).requires_grad_(), sg.shard(w, column.rhs, mesh).requires_grad_()
    y = sg.matmul(xs, ws, column, mesh) + sg.matmul(xs, ws, column, mesh)
    y.backward(sg.shard(dy, column.out, mesh))
    assert xs.grad is not None
    assert ws.grad is not None
    assert_same(xs.grad, column.lhs, 2 * expected["dX"], mesh, sizes, "dX of two uses")
    assert_same(ws.grad, column.rhs, 2 * expected["dW"], mesh, sizes, "dW of two uses")
    gram = Layout("X[n,d/tp] W[m,d/tp] -> Y[n,m]")
    xs = sg.shard(x, gram.lhs, mesh).requires_grad_()
    g = integers(gram.out, {"n": 5, "m": 5, "d": 4}, 9)
    sg.matmul(xs, xs, gram, mesh).backward(g)
    assert xs.grad is not None
    assert_same(xs.grad, gram.lhs, (g + g.T) @ x, mesh, sizes, "gradient of X Xᵀ")


@distributed(world_size=[2, 4])
def test_an_axis_that_the_layout_does_not_mention_is_never_communicated(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    layout = PRESETS["column"]
    mine = mesh.get_local_rank("dp")
    # other rows, another number of them, and other weights on each replica: all independent
    sizes = {"n": 3 + 2 * mine, "d": 4, "m": 5}
    x, w, _, dy = (integers(t, sizes, 7 + mine) for t in (*layout.tensors[:2], layout.bias, layout.out))
    expected = reference(layout, x, w, None, dy)
    xs, ws = sg.shard(x, layout.lhs, mesh).requires_grad_(), sg.shard(w, layout.rhs, mesh).requires_grad_()
    with sg.trace_collectives() as traced:
        sg.matmul(xs, ws, layout, mesh).backward(sg.shard(dy, layout.out, mesh))
    assert {event.axis for event in traced} <= {"tp"}
    assert xs.grad is not None
    assert ws.grad is not None
    np.testing.assert_array_equal(xs.grad.numpy(), expected["dX"].numpy())
    np.testing.assert_array_equal(ws.grad.numpy(), sg.shard(expected["dW"], layout.rhs, mesh).numpy())


@distributed(world_size=[2, 3])
def test_marks_leave_the_sum_to_the_caller(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp}")
    sizes = {"n": 3, "d": 7, "m": 5}
    x, w, b, dy = (integers(t, sizes, at) for at, t in enumerate((*layout.tensors[:2], layout.bias, layout.out)))
    expected = reference(layout, x, w, b, dy)
    xs, ws, bs = (
        sg.shard(full, spec, mesh).requires_grad_()
        for full, spec in ((x, layout.lhs), (w, layout.rhs), (b, layout.bias))
    )
    with sg.trace_collectives() as traced:
        y = sg.matmul(xs, ws, layout, mesh, bias=bs)
    assert not [event for event in traced if event.operation == "all-reduce"]
    total = sg.all_reduce(y, mesh)  # its adjoint hands every rank the same dY
    total.backward(dy)
    assert_same(total, sg.TensorSpec("Y", layout.out.dims), expected["Y"], mesh, sizes, "Y, bias added once")
    assert xs.grad is not None
    assert bs.grad is not None
    assert_same(xs.grad, layout.lhs, expected["dX"], mesh, sizes, "dX")
    assert_same(bs.grad, layout.bias, expected["db"], mesh, sizes, "db")


@distributed(world_size=[2, 3])
def test_the_bias_alone_needs_no_gathered_gradient(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for text in ("X[n,d/tp] W[d/tp,m] -> Y[n/tp,m] + B[m]", "X[n,d/tp] W[d/tp,m] -> Y[n,m/tp] + B[m]"):
        check(Layout(text), mesh, {"n": 5, "d": 4, "m": 7}, frozen=("X", "W"))


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduce_dtype_sums_16_bit_partials_in_fp32(world_size: int, dtype: torch.dtype) -> None:
    """Partial sums 256, 1, 1, … are exact in 16 bits, but 256 + 1 is not in bf16; in fp32 the sum is right until it is
    rounded once, at the end."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout("X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]")
    rank = mesh.get_local_rank("tp")
    big = 256 if dtype == torch.bfloat16 else 2048
    terms = [big, 1, 1][:world_size]
    terms[1] = 3 if world_size == 2 else 1  # 256 + 3 rounds to 260, 256 + 1 + 1 is 258 exactly
    x = torch.full((world_size, 1), float(terms[rank]), dtype=dtype)
    with sg.trace_collectives() as traced:
        y = sg.matmul(
            x, torch.ones(1, 2, dtype=dtype), layout, mesh, sizes={"n": world_size}, reduce_dtype=torch.float32
        )
    exact = torch.tensor(float(sum(terms)), dtype=torch.float64).to(dtype)
    assert torch.equal(y, exact.expand(1, 2))
    assert [(e.dtype, e.operation) for e in traced if e.operation == "reduce-scatter"] == [
        ("float32", "reduce-scatter")
    ]
    assert y.dtype == dtype


@distributed(world_size=[2, 3])
def test_in_16_bit_the_error_stays_within_the_bound_of_the_arithmetic(world_size: int) -> None:
    """|error| <= gamma |X||W| with fp32 accumulation inside a product (k terms), one rounding of each partial sum to
    bf16, p - 1 bf16 additions, each componentwise (Higham, Accuracy and Stability, section 3.1)."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]")
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 33, generator=generator).bfloat16()
    w = torch.randn(33, 7, generator=generator).bfloat16()
    y = sg.matmul(sg.shard(x, layout.lhs, mesh), sg.shard(w, layout.rhs, mesh), layout, mesh)
    exact = x.double() @ w.double()
    u16, u32 = 2.0**-8, 2.0**-24
    steps = world_size * u16 + 33 * u32  # one rounding of the partial, p - 1 additions, the product in fp32
    bound = steps / (1 - steps) * (x.double().abs() @ w.double().abs())
    error = (y.double() - exact).abs()
    assert bool((error <= bound).all())
    assert float(error.max()) > 0
    # A missing term is far outside.
    partial = sg.shard(x, layout.lhs, mesh).double() @ sg.shard(w, layout.rhs, mesh).double()
    assert bool(((partial - exact).abs() > bound).any())


@distributed(world_size=2)
def test_nan_reaches_the_result_and_every_gradient_it_touches(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = PRESETS["row_sequence"]
    x = torch.ones(3, 2)
    if mesh.get_local_rank("tp") == 1:
        x[0, 0] = float("nan")
    x.requires_grad_()
    w = torch.ones(2, 2, requires_grad=True)
    y = sg.matmul(x, w, layout, mesh, sizes={"n": 3})
    y.sum().backward()
    full = sg.unshard(y, layout.out, mesh)
    assert bool(full[0].isnan().all())
    assert not bool(full[1:].isnan().any())
    assert w.grad is not None
    assert bool(w.grad.isnan().any()) == (mesh.get_local_rank("tp") == 1)


@distributed(world_size=2)
def test_no_grad_and_frozen_inputs_save_nothing_and_send_nothing_back(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    x, w = torch.randn(2, 3), torch.randn(3, 2, requires_grad=True)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = sg.matmul(x, w, PRESETS["column"], mesh)
    assert saved == [(2, 3)]  # X for dW; W is not needed, for there is no dX
    with sg.trace_collectives() as traced:
        y.sum().backward()
    assert len(traced) == 0
    with torch.no_grad():
        assert not sg.matmul(x, w, PRESETS["column"], mesh).requires_grad


@distributed(world_size=2)
def test_backward_overlaps_the_reduction_of_dx_with_the_product_of_dw(world_size: int) -> None:
    """The order in which things start: dX's reduction before dW's product, a repeated gather of X before dX's."""
    from shardgrad.comm import collectives
    from shardgrad.comm.shim import TorchDispatchMode

    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    log: list[str] = []
    patched = pytest.MonkeyPatch()

    def wrap(owner: object, name: str, say: str) -> None:
        real = getattr(owner, name)

        def called(*args: object, **kwargs: object) -> object:
            log.append(say)
            return real(*args, **kwargs)

        patched.setattr(owner, name, called)

    x = torch.randn(2, 3, requires_grad=True)
    w = torch.randn(3, 2, requires_grad=True)
    y = sg.matmul(x, w, PRESETS["column_sequence"], mesh, sizes={"n": 4})
    wrap(collectives.AllGather, "start", "start gather")
    wrap(collectives.ReduceScatter, "start", "start reduce")
    wrap(collectives.AllGather, "wait", "wait")
    wrap(collectives.ReduceScatter, "wait", "wait")

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.mm.default:
                log.append("product")
            return func(*args, **(kwargs or {}))

    with Products():
        y.backward(torch.randn(4, 2))
    patched.undo()
    assert log == ["start gather", "product", "start reduce", "wait", "product", "wait"]


@distributed(world_size=2)
def test_what_is_frozen_in_one_call_and_trained_in_the_next(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    x, w, b = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
    for wanted in [(0, 1, 0), (1, 0, 0), (1, 1, 1), (0, 0, 1), (0, 1, 1), (1, 0, 0)]:
        for bias in (None, b):
            for tensor, want in zip((x, w, b), wanted):
                tensor.grad = None
                tensor.requires_grad_(bool(want))
            y = sg.matmul(x, w, "X[n,d] W[m/tp,d] -> Y[n,m/tp]", mesh, bias)
            if not y.requires_grad:
                assert bias is None
                assert wanted == (0, 0, 1)
                continue
            y.sum().backward()
            got = [tensor.grad is not None for tensor in (x, w, b)]
            assert got == [bool(wanted[0]), bool(wanted[1]), bool(wanted[2]) and bias is not None]


@distributed(world_size=2)
def test_ranks_whose_losses_use_different_outputs(world_size: int) -> None:
    """One global loss, of which each rank computes the part of its own rows: a gradient that is absent here is zero."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layouts = [Layout(f"X[n,d/tp] W[d/tp,{m}] -> Y[n/tp,{m}]") for m in "pq"]
    sizes = {"n": 3, "d": 5, "p": 4, "q": 2}
    x = integers(layouts[0].lhs, sizes, 1)
    ws = [integers(layout.rhs, sizes, 2 + at) for at, layout in enumerate(layouts)]
    dys = [integers(layout.out, sizes, 4 + at) for at, layout in enumerate(layouts)]
    dys[0][2:] = 0  # the first product is used by rank 0 alone (rows 0, 1), the second by rank 1 alone (row 2)
    dys[1][:2] = 0
    local = [sg.shard(w, layout.rhs, mesh).requires_grad_() for w, layout in zip(ws, layouts)]
    xs = sg.shard(x, layouts[0].lhs, mesh).requires_grad_()
    ys = sg.matmul(xs, list(zip(local, layouts)), mesh)
    rank = mesh.get_local_rank("tp")
    ys[rank].backward(sg.shard(dys[rank], layouts[rank].out, mesh))
    assert xs.grad is not None
    assert_same(xs.grad, layouts[0].lhs, dys[0] @ ws[0].T + dys[1] @ ws[1].T, mesh, sizes, "dX")
    for w, layout, dy in zip(local, layouts, dys):
        assert w.grad is not None
        assert_same(w.grad, layout.rhs, x.T @ dy, mesh, sizes, f"d{layout.rhs}")


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize(
    "text",
    [
        "X[b,s,d] W[d,m/tp] -> Y[b,s,m/tp]",
        "X[b,s,d] W[d,m/tp] -> Y[m/tp,s,b]",
        "X[b,s,d] W[d,m/tp] -> Y[b,m/tp,s]",
        "X[b,s,d/tp] W[d/tp,m] -> Y[b,s/tp,m]",
        "X[b,s,d/tp] W[d/tp,m] -> Y[b/tp,s,m]",
    ],
)
def test_outputs_can_be_changed_in_place(world_size: int, text: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout(text)
    sizes = {"b": 4, "s": 5, "d": 3, "m": 7}
    x, w = integers(layout.lhs, sizes, 1), integers(layout.rhs, sizes, 2)
    ws = sg.shard(w, layout.rhs, mesh).requires_grad_()
    y = sg.matmul(sg.shard(x, layout.lhs, mesh), ws, layout, mesh)
    expected = y.detach().clone().relu()
    torch.relu_(y)
    assert torch.equal(y.detach(), expected)
    y.sum().backward()
    assert ws.grad is not None


@distributed(world_size=[1, 2])
def test_autocast_casts_operands_as_it_does_for_torchs_own_products(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 6), sg.ColumnParallelLinear(6, 8, mesh=mesh), sg.RowParallelLinear(8, 6, mesh=mesh)
    )
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), sg.trace_collectives() as traced:
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all())
    assert {event.dtype for event in traced if event.operation == "all-reduce"} <= {"bfloat16"}


@distributed(world_size=2, backend="late")
@pytest.mark.parametrize(
    "text",
    [
        "X[n/tp,d] W[d,a,b] -> Y[n/tp,b,a] + B[a,b]",  # db is summed in another order of letters than dY's
        "X[n,d/tp] W[d/tp,a,b] -> Y[b,n,a/tp] + B[a,b]",
        "X[d,n/tp] W[a/tp,d] -> Y[a/tp,n]",
        "X[n,d] W[d,m/tp] -> Y[m/tp,n] + B[n]",
    ],
)
def test_collectives_are_given_contiguous_tensors(world_size: int, text: str) -> None:
    """NCCL refuses others, and so does the late backend."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout(text)
    check(layout, mesh, {letter: {"n": 8, "d": 6, "a": 4, "b": 3, "m": 4}[letter] for letter in layout.letters})
