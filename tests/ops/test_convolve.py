"""Convolutions under the rule, on real ranks: equal to windows and loops in NumPy on integers, sent as predicted."""

from __future__ import annotations

import pickle
import random
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import assert_same, integers
from layouts import grids, random_layout
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad import Layout
from shardgrad.ops.reference import add_bias, bias_backward, contract, contract_backward
from shardgrad.testing import distributed

Settings = dict[str, tuple[int, ...]]


def windows(x: np.ndarray, kernel: tuple[int, ...], made: tuple[int, ...], settings: Settings) -> np.ndarray:
    """P[…,i,j,p,q] = X[…, p·stride + i·dilation − padding, …], zero outside."""
    n = len(kernel)
    padded = np.pad(x, [(0, 0)] * (x.ndim - n) + [(p, p) for p in settings["padding"]])
    out = np.zeros((*x.shape[: x.ndim - n], *kernel, *made), x.dtype)
    for index in product(*map(range, kernel)):
        cut = (slice(None),) * (x.ndim - n) + tuple(
            slice(i * d, i * d + (m - 1) * s + 1, s)
            for i, d, m, s in zip(index, settings["dilation"], made, settings["stride"])
        )
        out[(slice(None),) * (x.ndim - n) + index] = padded[cut]
    return out


def windows_adjoint(dp: np.ndarray, shape: tuple[int, ...], settings: Settings, n: int) -> np.ndarray:
    """What `windows` read from each element, summed back."""
    lead = len(shape) - n
    kernel, made = dp.shape[lead : lead + n], dp.shape[lead + n :]
    padded = np.zeros((*shape[:lead], *(s + 2 * p for s, p in zip(shape[lead:], settings["padding"]))), dp.dtype)
    for index in product(*map(range, kernel)):
        cut = (slice(None),) * lead + tuple(
            slice(i * d, i * d + (m - 1) * s + 1, s)
            for i, d, m, s in zip(index, settings["dilation"], made, settings["stride"])
        )
        padded[cut] += dp[(slice(None),) * lead + index]
    return padded[(slice(None),) * lead + tuple(slice(p, p + s) for s, p in zip(shape[lead:], settings["padding"]))]


def out_sizes(layout: Layout, sizes: dict[str, int], settings: Settings) -> dict[str, int]:
    n = layout.spatial
    return {
        y: (sizes[x] + 2 * p - d * (sizes[w] - 1) - 1) // s + 1
        for x, w, y, p, d, s in zip(
            layout.lhs.letters[-n:],
            layout.rhs.letters[-n:],
            layout.out.letters[-n:],
            settings["padding"],
            settings["dilation"],
            settings["stride"],
        )
    }


def reference(layout: Layout, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor, settings: Settings) -> list[Tensor]:
    """Y, dX, dW, db in exact integers: a contraction of windows, as the derivation tells it."""
    n = layout.spatial
    index = {letter: chr(ord("a") + at) for at, letter in enumerate(layout.letters)}
    xs, ws, ys, bs = ("".join(index[letter] for letter in tensor.letters) for tensor in layout.tensors)
    ps = xs[:-n] + ws[-n:] + ys[-n:]
    spec = f"{ps},{ws}->{ys}"
    xn, wn, dyn = (t.numpy().astype(np.int64) for t in (x, w, dy))
    patches = windows(xn, wn.shape[-n:], dyn.shape[-n:], settings)
    y = contract(patches, wn, spec)
    if b is not None:
        y = add_bias(y, b.numpy().astype(np.int64), f"{bs}->{ys}")
    dp, dw = contract_backward(patches, wn, dyn, spec)
    dx = windows_adjoint(dp, xn.shape, settings, n)
    return [torch.from_numpy(np.asarray(v)).to(x.dtype) for v in (y, dx, dw, bias_backward(dyn, f"{bs}->{ys}"))]


def check(
    layout: Layout,
    mesh: DeviceMesh,
    sizes: dict[str, int],
    settings: Settings,
    *,
    seed: int = 0,
    bias: bool = True,
    give_sizes: bool = True,
    save_gathered: tuple[str, ...] = (),
    frozen: tuple[str, ...] = (),
) -> None:
    sizes = {**sizes, **out_sizes(layout, sizes, settings)}
    tensors = (layout.lhs, layout.rhs, layout.bias, layout.out)
    dtype = torch.float64 if seed % 2 else torch.float32
    x, w, b, dy = (integers(t, sizes, 10 * seed + at, dtype) for at, t in enumerate(tensors))
    expected = reference(layout, x, w, b if bias else None, dy, settings)
    local = [sg.shard(f, s, mesh).requires_grad_(s.name not in frozen) for f, s in zip((x, w, b), tensors)]
    dy_local = sg.shard(dy, layout.out, mesh)
    for _ in range(2):  # the first call also compares layouts between ranks
        for tensor in local:
            tensor.grad = None
        with sg.trace_collectives() as traced:
            y = sg.convolve(
                *local[:2],
                layout,
                mesh,
                local[2] if bias else None,
                sizes if give_sizes else None,
                save_gathered=save_gathered,
                **settings,  # type: ignore[arg-type]
            )
            if y.requires_grad:
                y.backward(dy_local)
        what = f"{layout} with {sizes}, {settings}"
        assert_same(y, layout.out, expected[0], mesh, sizes, f"Y of {what}")
        for tensor, spec, right in zip(local, tensors, expected[1:]):
            if spec.name in frozen or (spec is layout.bias and not bias):
                assert tensor.grad is None
            else:
                assert tensor.grad is not None
                assert_same(tensor.grad, spec.grad, right, mesh, sizes, f"d{spec.name} of {what}")
    if give_sizes and y.requires_grad:
        names = mesh.mesh_dim_names or ()
        predicted = layout.collectives(
            sizes,
            dict(zip(names, mesh.shape)),
            dtype,
            bias=bias,
            frozen=[name for name in frozen if name != layout.bias.name or bias],
            save_gathered=save_gathered,
            coordinate={name: mesh.get_local_rank(name) for name in names},
        )
        assert sorted((p.operation, p.axis, p.bytes) for p in predicted) == sorted(
            (event.operation, event.axis, event.bytes) for event in traced
        ), f"sent by {what}"


KNOWN = [
    "X[b,c,h,w] W[o/tp,c,i,j] -> Y[b,o/tp,p,q]",
    "X[b,c/tp,h,w] W[o,c/tp,i,j] -> Y[b,o,p,q]",
    "X[b/tp,c,h,w] W[o,c,i,j] -> Y[b/tp,o,p,q]",
    "X[b/tp,c,h,w] W[o/tp,c,i,j] -> Y[b/tp,o,p,q] + B[o/tp]",
    "X[b,g/tp,c,h,w] W[g/tp,o,c,i,j] -> Y[b,g/tp,o,p,q] + B[g/tp,o]",
    "X[b,g,c,h,w] W[g,o/tp,c,i,j] -> Y[b,g,o/tp,p,q] + B[g,o/tp]",
    "X[b,g,c/tp,h,w] W[g,o,c/tp,i,j] -> Y[b,g,o,p,q] + B[o,g]",
    "X[b,c,h/tp,w] W[o/tp,c,i,j] -> Y[b,o/tp,p,q]",  # stored on a spatial letter, gathered before use
    "X[b,c/tp,h,w] W[o,c/tp,i,j] -> Y[b,o,p,q/tp]",  # reduce-scattered on one
    "X[b/tp,c,h,w] W[o,c,i/tp,j] -> Y[b/tp,o,p,q]",
    "X[c,b,h,w] W[c,o/tp,i,j] -> Y[o/tp,b,p,q]",  # letters in another order
]
SETTINGS: list[Settings] = [
    {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"stride": (3, 2), "padding": (0, 1), "dilation": (2, 1)},
]


def drawn(rng: random.Random, layout: Layout) -> dict[str, int]:
    """Sizes that divide by nothing, and now and then none at all; kernels that fit into what they slide along."""
    n = layout.spatial
    channels = [x for x in layout.letters if x not in {y for t in layout.tensors[:3] for y in t.letters[-n:]}]
    sizes = {letter: rng.choice([1, 2, 3, 5, 5, 7]) for letter in channels}
    if rng.random() < 0.15 and channels:
        sizes[rng.choice(channels)] = 0
    for x, w in zip(layout.lhs.letters[-n:], layout.rhs.letters[-n:]):
        sizes[x], sizes[w] = rng.randint(5, 8), rng.randint(1, 3)
    return sizes


@distributed(world_size=[1, 2, 3, 4])
def test_known_layouts_with_stride_padding_and_dilation(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rng = random.Random(5)
    for at, text in enumerate(KNOWN):
        layout = Layout(text, spatial=2)
        for seed, settings in enumerate(SETTINGS):
            bias = layout.has_bias or seed != 1
            check(layout, mesh, drawn(rng, layout), settings, seed=seed + 3 * at, give_sizes=seed < 2, bias=bias)
    one = {"stride": (2,), "padding": (1,), "dilation": (2,)}
    for text in ("X[b/tp,c,h] W[o,c,i] -> Y[b/tp,o,p] + B[o,p]", "X[n,b,c/tp,h] W[o,c/tp,i] -> Y[o,b,n,p]"):
        layout = Layout(text, spatial=1)
        check(layout, mesh, drawn(rng, layout), one)
    three = {"stride": (1, 2, 1), "padding": (1, 0, 0), "dilation": (1, 1, 2)}
    layout = Layout("X[b,c/tp,h,w,z] W[o,c/tp,i,j,k] -> Y[b,o,p,q,r]", spatial=3)
    check(layout, mesh, drawn(rng, layout), three)


@distributed(world_size=[1, 2, 3, 4], timeout=120)
def test_random_legal_layouts(world_size: int) -> None:
    rng = random.Random(70 + world_size)
    for dims in (1, 2):
        axes = ("p1", "p2")[:dims]
        for grid in grids(world_size, dims):
            mesh = init_device_mesh("cpu", grid, mesh_dim_names=axes)
            for at in range(6):
                plain = str(random_layout(rng, axes))
                for name, letters in (("X", "u,v"), ("W", "s,t"), ("Y", "y,z")):
                    start = plain.index(f"{name}[")
                    end = plain.index("]", start)
                    comma = "" if plain[end - 1] == "[" else ","
                    plain = f"{plain[:end]}{comma}{letters}{plain[end:]}"
                layout = Layout(plain, spatial=2)
                check(
                    layout,
                    mesh,
                    drawn(rng, layout),
                    rng.choice(SETTINGS),
                    seed=at,
                    bias=layout.has_bias or rng.random() < 0.5,
                    give_sizes=rng.random() < 0.7,
                    save_gathered=rng.choice([(), ("X",), ("W",)]),
                    frozen=tuple(name for name in "XWB" if rng.random() < 0.15),
                )


@distributed(world_size=[1, 3])
def test_depthwise_equals_torch_in_torchs_own_shapes(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout("X[b,g/tp,c,h,w] W[g/tp,o,c,i,j] -> Y[b,g/tp,o,p,q]", spatial=2)
    sizes = {"b": 2, "g": 5, "c": 1, "o": 3, "h": 6, "w": 7, "i": 3, "j": 2}
    x, w = integers(layout.lhs, sizes, 1), integers(layout.rhs, sizes, 2)
    y = sg.convolve(sg.shard(x, layout["X"], mesh), sg.shard(w, layout["W"], mesh), str(layout), mesh, stride=2)
    right = F.conv2d(x.flatten(1, 2), w.flatten(0, 1), groups=5, stride=2)
    assert torch.equal(sg.unshard(y, layout["Y"], mesh).flatten(1, 2), right)


@distributed(world_size=2)
def test_results_are_tensors_of_their_own(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for text in ("X[b,c,h] W[o/tp,c,i] -> Y[b,o/tp,p]", "X[b,g/tp,c,h] W[g/tp,o,c,i] -> Y[g/tp,o,b,p]"):
        layout = Layout(text, spatial=1)
        sizes = {"b": 2, "c": 3, "g": 3, "o": 4, "h": 5, "i": 2}
        x, w = (sg.shard(integers(t, sizes, 1), t, mesh).requires_grad_() for t in layout.tensors[:2])
        y = sg.convolve(x, w, layout, mesh)
        torch.relu_(y)  # of a view, autograd would refuse it
        y.sum().backward()
        assert x.grad is not None
        xl = x.detach().to(memory_format=torch.contiguous_format).transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(sg.convolve(xl, w, layout, mesh).relu(), y)


def test_axes_on_spatial_letters_are_refused_with_a_reason() -> None:
    for text, caret in (
        ("X[b,c,h/tp,w] W[o,c,i,j] -> Y[b,o,p/tp,q]", "X has it on h"),
        ("X[b,c,h,w] W[o,c,i/tp,j] -> Y[b,o,p,q]", "W has it on i"),
    ):
        with pytest.raises(
            sg.LayoutError, match=rf"{caret}, which the convolution slides along(.|\n)*halos"
        ) as refused:
            Layout(text, spatial=2)
        assert "Split one of b, c, o" in str(refused.value)
        assert "X[b,c,h,w] W[o,c,i,j] -> Y[b,o,p,q]" in str(refused.value)  # the nearest legal one
    with pytest.raises(sg.LayoutError, match=r"spatial letter h of X .* stands in another tensor:"):
        Layout("X[b,c,h] W[o,c,h] -> Y[b,o,h]", spatial=1)
    with pytest.raises(sg.LayoutError, match="spatial letter c of X"):
        Layout("X[b,c] W[o,c] -> Y[b,o]", spatial=1)
    with pytest.raises(sg.LayoutError, match="fewer dims than the 2"):
        Layout("X[h] W[i,j] -> Y[p,q]", spatial=2)
    with pytest.raises(sg.LayoutError, match="letter h stands in X alone"):
        Layout("X[b,c,h] W[o,c,i] -> Y[b,o,p]")


def test_a_layout_with_spatial_dims_is_another_layout() -> None:
    layout = Layout("X[b,c,h] W[o/tp,c,i] -> Y[b,o/tp,p]", spatial=1)
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout
    assert hash(again) == hash(layout)
    assert repr(layout).endswith(", spatial=1)")
    assert (layout.rows, layout.contracted, layout.columns, layout.batched) == (("b",), ("c",), ("o",), ())
    text = layout.explain()
    assert "compute     Y[b,o/tp,p] = Σ_c X[b,c,h] ∗ W[o/tp,c,i]" in text
    assert "compute     dX[b,c,h] = Σ_o dY[b,o/tp,p] ∗ W[o/tp,c,i]" in text
    assert "all-reduce  dX over tp" in text


@distributed(world_size=2)
def test_wrong_uses_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    text = "X[b,c,h] W[o,c,i] -> Y[b,o,p]"
    x, w = torch.ones(2, 3, 4), torch.ones(5, 3, 2)
    with pytest.raises(sg.ShapeError, match="stride is a whole number of at least 1, or 1 of them, not 0"):
        sg.convolve(x, w, text, mesh, stride=0)
    with pytest.raises(sg.ShapeError, match=r"padding is .* not \(1, 1\)"):
        sg.convolve(x, w, text, mesh, padding=(1, 1))
    with pytest.raises(sg.ShapeError, match=r"padding is .* not 'same'"):
        sg.convolve(x, w, text, mesh, padding="same")  # type: ignore[arg-type]
    with pytest.raises(sg.ShapeError, match="kernel of i = 2 with dilation 4 does not fit into h = 4"):
        sg.convolve(x, w, text, mesh, dilation=4)
    with pytest.raises(sg.ShapeError, match="sizes says p = 4, but h = 4 and i = 2 make it 3"):
        sg.convolve(x, w, text, mesh, sizes={"p": 4})
    with pytest.raises(sg.LayoutError, match="has 0 spatial dims"):
        sg.convolve(torch.ones(2, 3), torch.ones(3, 4), "X[n,d] W[d,m] -> Y[n,m]", mesh)
    with pytest.raises(sg.LayoutError, match=r"spatial dims, but a product has 0: .* sg\.convolve"):
        sg.matmul(x, w, Layout(text, spatial=1), mesh)
    with pytest.raises(sg.ShapeError, match="its c is 4 here"):
        sg.convolve(x, torch.ones(5, 4, 2), text, mesh)


@distributed(world_size=2)
def test_ranks_with_other_settings_are_told(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    x, w = torch.ones(2, 3, 4, requires_grad=True), torch.ones(2, 3, 2)
    with pytest.raises(sg.DisagreementError, match=r"padding \(1,\)"):
        sg.convolve(x, w, "X[b,c,h] W[o/tp,c,i] -> Y[b,o/tp,p]", mesh, padding=mesh.get_local_rank("tp"))
