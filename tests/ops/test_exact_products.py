"""Products in exact mode: the same bits of Y, dX, dW and db on every number of ranks that divides the pieces."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from bits import Meshes, normal, odd
from layouts import random_layout
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad import PRESETS, Layout
from shardgrad.ops.in_pieces import Piecewise
from shardgrad.testing import distributed

LAYOUTS = {name: str(layout) for name, layout in PRESETS.items()}
LAYOUTS |= {
    "column, torch's weight": "X[b,s,d] W[m/tp,d] -> Y[b,s,m/tp]",
    "row, a sequence dim": "X[b,s,d/tp] W[m,d/tp] -> Y[b,s/tp,m] + B[m]",
    "2d, scattered": "X[n/dp,d/tp] W[d/tp,m/dp] -> Y[n/dp/tp,m]",
    "batch and sequence": "X[b/dp,s/cp,d] W[m,d] -> Y[b/dp,s/cp,m] + B[m]",
    "attention's output": "X[b,s,h/tp,k] W[h/tp,k,d] -> Y[b,s,d]",
    "a batch of products": "X[e,n/tp,d] W[e,d,m] -> Y[e,n/tp,m]",
    "letters in another order": "X[d/tp,n] W[m,d/tp] -> Y[m,n]",
    "no rows": "X[d/tp] W[d/tp,m] -> Y[m]",
    "a stored bias": "X[n,d/tp] W[d/tp,m] -> Y[n,m] + B[m/tp]",
}
PRECISION: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "fp64": (torch.float64, None),
    "bf16": (torch.bfloat16, None),
    "bf16 with fp32 sums": (torch.bfloat16, torch.float32),
}


def sizes_for(layout: Layout, pieces: Mapping[str, int], seed: int = 0) -> dict[str, int]:
    """Of each letter: the pieces of all axes that ever shard it, times an odd number."""
    axes: dict[str, set[str]] = {letter: set(layout.plan.splitting.get(letter, ())) for letter in layout.letters}
    for tensor in layout.tensors:
        for dim in tensor.dims:
            axes[dim.letter].update(dim.axes)
    return {
        letter: odd(at + seed) * prod(pieces[axis] for axis in cut) for at, (letter, cut) in enumerate(axes.items())
    }


def operands(layout: Layout, sizes: Mapping[str, int], dtype: torch.dtype, bias: bool) -> dict[str, Tensor]:
    specs = [layout.lhs, layout.rhs, *([layout.bias] if bias else []), layout.out]
    return {
        spec.name: normal(*(sizes[letter] for letter in spec.letters), seed=at, dtype=dtype)
        for at, spec in enumerate(specs)
    }


def multiplied(
    layout: Layout,
    full: Mapping[str, Tensor],
    sizes: dict[str, int],
    mesh: DeviceMesh,
    *,
    frozen: tuple[str, ...] = (),
    how: str = "at once",
    **more: Any,
) -> dict[str, Tensor]:
    """Y and every gradient, whole. full: global operands, the bias if there is one, and dY under the name of Y."""
    names = [name for name in full if name != layout.out.name]
    leaves = {name: nn.Parameter(sg.shard(full[name], layout[name], mesh), name not in frozen) for name in names}
    x, w, *b = leaves.values()
    buffers = sg.use_main_grads(leaves.values()) if how == "main_grad" else []
    y = sg.matmul(x, w, layout, mesh, *b, sizes=sizes, **more)
    dy = sg.shard(full[layout.out.name], layout.out, mesh)
    if how == "deferred" and y.requires_grad:
        with sg.defer_weight_grads() as later:
            y.backward(dy)
        later.run()
    elif y.requires_grad:
        y.backward(dy)
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if how == "main_grad":
        assert not grads
        grads = {f"d{name}": buffer for name, buffer in zip([n for n in names if n not in frozen], buffers)}
    assert len(grads) == len([name for name in names if name not in frozen])
    whole = {key: sg.unshard(grad, layout[key[1:]], mesh, sizes=sizes) for key, grad in grads.items()}
    return {"Y": sg.unshard(y, layout.out, mesh, sizes=sizes), **whole}


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def over(pieces: int, layout: Layout) -> dict[str, int]:
    return dict.fromkeys(layout.axes, pieces)


MOST = ["fp32", *slow("bf16 with fp32 sums")]
"""Precisions, of which fp32 shows most of what goes wrong."""


def check(meshes: Meshes, layout: Layout, precision: str, seed: int = 0, **more: Any) -> None:
    """One layout, with a bias and without."""
    sizes, (dtype, wide) = sizes_for(layout, meshes.pieces, seed), PRECISION[precision]
    for bias in (True, False):
        if bias or not layout.has_bias:
            full = operands(layout, sizes, dtype, bias)
            meshes.run(
                f"{layout} {sizes} {bias} {more}",
                lambda mesh, full=full, wide=wide: multiplied(layout, full, sizes, mesh, reduce_dtype=wide, **more),
            )


def by_axes() -> dict[tuple[str, ...], list[Layout]]:
    found: dict[tuple[str, ...], list[Layout]] = {}
    for text in LAYOUTS.values():
        layout = Layout(text)
        found.setdefault(layout.axes, []).append(layout)
    return found


def axes_and_precisions() -> Iterator[Any]:
    """fp32 for all; of the others, one for each set of axes."""
    others = [name for name in PRECISION if name != "fp32"]
    for at, axes in enumerate(by_axes()):
        yield axes, "fp32"
        yield pytest.param(axes, others[at % len(others)], marks=pytest.mark.slow)


@distributed(world_size=4, timeout=300)
@pytest.mark.parametrize(("axes", "precision"), list(axes_and_precisions()))
def test_every_layout_has_the_same_bits_on_every_mesh(world_size: int, axes: tuple[str, ...], precision: str) -> None:
    same_on_every_mesh(world_size, axes, precision)


@distributed(world_size=8, timeout=300)
@pytest.mark.parametrize("axes", list(by_axes())[::2], ids="-".join)
def test_on_eight_ranks(world_size: int, axes: tuple[str, ...]) -> None:
    same_on_every_mesh(world_size, axes, "fp32")


def same_on_every_mesh(world_size: int, axes: tuple[str, ...], precision: str) -> None:
    meshes = Meshes(dict.fromkeys(axes, world_size))
    for at, layout in enumerate(by_axes()[axes]):
        check(meshes, layout, precision, at)
    meshes.assert_same()


@distributed(world_size=3, timeout=120)
@pytest.mark.parametrize("pieces", [6, 12, 3])
@pytest.mark.parametrize("precision", MOST)
def test_pieces_that_are_no_power_of_two(world_size: int, pieces: int, precision: str) -> None:
    meshes = Meshes({"tp": pieces})
    for at, name in enumerate(["column", "column_sequence", "row", "row_sequence", "attention's output"]):
        check(meshes, Layout(LAYOUTS[name]), precision, at)
    meshes.assert_same()


@distributed(world_size=4)
@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ({"dp": 2, "tp": 6}, LAYOUTS["fsdp_tp_sequence"]),
        ({"dp": 12, "cp": 2}, LAYOUTS["batch and sequence"]),
        ({"k": 2, "r": 6, "c": 4}, LAYOUTS["2.5d"]),
        ({"a": 4, "b": 3, "c": 2}, LAYOUTS["3d"]),
    ],
)
@pytest.mark.parametrize("precision", MOST)
def test_other_pieces_on_each_axis(world_size: int, pieces: dict[str, int], text: str, precision: str) -> None:
    meshes = Meshes(pieces)
    check(meshes, Layout(text), precision)
    meshes.assert_same()


VARIANTS: dict[str, dict[str, Any]] = {
    "deferred": {"how": "deferred"},
    "main gradients": {"how": "main_grad"},
    "gathered operands kept": {"save_gathered": ("X", "W")},
    "X frozen": {"frozen": ("X",)},
    "W frozen": {"frozen": ("W",)},
    "all but X frozen": {"frozen": ("W", "B")},
    "all frozen": {"frozen": ("X", "W", "B")},
}


@distributed(world_size=4)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_ways_through_backward(world_size: int, variant: str) -> None:
    for axes, names in (("tp",), ["column_sequence", "row_sequence"]), (("dp", "tp"), ["fsdp_tp_sequence"]):
        meshes = Meshes(dict.fromkeys(axes, 4), largest_only=True)
        for at, name in enumerate(names):
            layout = Layout(LAYOUTS[name])
            sizes = sizes_for(layout, meshes.pieces, at)
            for dtype, wide in ((torch.float32, None), (torch.bfloat16, torch.float32)):
                full = operands(layout, sizes, dtype, True)
                more = VARIANTS[variant] | {"reduce_dtype": wide}
                if "frozen" in more:
                    names_of = dict(zip(("X", "W", "B"), full))
                    more["frozen"] = tuple(names_of[role] for role in more["frozen"])

                def run(mesh: DeviceMesh, layout=layout, full=full, sizes=sizes, more=more) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
                    return multiplied(layout, full, sizes, mesh, **more)

                meshes.run(f"{layout} {dtype} {variant}", run)
        meshes.assert_same()


@distributed(world_size=4)
def test_operands_and_gradients_that_are_not_contiguous(world_size: int) -> None:
    meshes = Meshes({"tp": 4})

    def strided(x: Tensor) -> Tensor:
        apart = x.new_full((*x.shape, 3), float("nan"))
        apart[..., 1] = x
        return apart[..., 1].detach()

    for name in ("column", "row", "row_sequence"):
        layout = Layout(LAYOUTS[name])
        sizes = sizes_for(layout, meshes.pieces)
        full = operands(layout, sizes, torch.float32, True)

        def run(mesh: DeviceMesh, kind: str, layout: Layout = layout, full=full, sizes=sizes) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
            made = {"strided": strided, "transposed": lambda x: x.t().contiguous().t() if x.dim() == 2 else x}
            way = made.get(kind, torch.clone)
            x, w, b, dy = (way(sg.shard(value, layout[key], mesh)) for key, value in full.items())
            leaves = [leaf.requires_grad_() for leaf in (x, w, b)]
            y = sg.matmul(*leaves[:2], layout, mesh, leaves[2], sizes=sizes)
            y.backward(dy)
            found = [("Y", y), *zip(("X", "W", "B"), [leaf.grad for leaf in leaves])]
            return {key: sg.unshard(value, layout[key], mesh, sizes=sizes) for key, value in found if value is not None}

        by_kind = {
            kind: meshes.run(f"{name} {kind}", lambda mesh, kind=kind, run=run: run(mesh, kind))
            for kind in ("contiguous", "strided", "transposed")
        }
        assert by_kind["contiguous"] == by_kind["strided"] == by_kind["transposed"]
    meshes.assert_same()


@distributed(world_size=4)
@pytest.mark.parametrize("used", [(True, True, True), (True, False, True), (False, False, True)])
def test_several_products_of_one_input(world_size: int, used: tuple[bool, ...]) -> None:
    """Query, key and value: dX is the sum of their terms, added piece by piece."""
    meshes = Meshes({"dp": 2, "tp": 4})
    sizes = {"b": 6, "s": 4 * 3, "d": 9}
    wide = {"q": 4 * 5, "k": 4 * 3, "v": 4}
    layouts = {x: Layout(f"X[b/dp,s/tp,d] W[{x}/tp,d] -> Y[b/dp,s,{x}/tp] + B[{x}/tp]") for x in wide}
    for dtype, sum_dtype in ((torch.float32, None), (torch.bfloat16, torch.float32)):
        x = normal(6, 12, 9, seed=1, dtype=dtype)
        ws = {name: normal(size, 9, seed=2 + size, dtype=dtype) for name, size in wide.items()}
        bs = {name: normal(size, seed=30 + size, dtype=dtype) for name, size in wide.items()}
        dys = {name: normal(6, 12, size, seed=60 + size, dtype=dtype) for name, size in wide.items()}

        def run(mesh: DeviceMesh, x=x, ws=ws, bs=bs, dys=dys, sum_dtype=sum_dtype) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
            first = layouts["q"]
            lx = nn.Parameter(sg.shard(x, first.lhs, mesh))
            lw = {name: nn.Parameter(sg.shard(ws[name], layouts[name].rhs, mesh)) for name in wide}
            lb = {name: nn.Parameter(sg.shard(bs[name], layouts[name].bias, mesh)) for name in wide}
            weights = [(lw[name], layouts[name], lb[name]) for name in wide]
            ys = sg.matmul(lx, weights, mesh=mesh, sizes=sizes, reduce_dtype=sum_dtype)
            chosen = [at for at, use in enumerate(used) if use]
            names = list(wide)
            grads = [sg.shard(dys[names[at]], layouts[names[at]].out, mesh) for at in chosen]
            torch.autograd.backward([ys[at] for at in chosen], grads)
            whole = {"dX": (lx.grad, first.lhs)}
            for at, name in enumerate(wide):
                whole[f"Y{name}"] = ys[at].detach(), layouts[name].out
                if used[at]:
                    whole |= {
                        f"dW{name}": (lw[name].grad, layouts[name].rhs),
                        f"db{name}": (lb[name].grad, layouts[name].bias),
                    }
            assert all(value is not None for value, _ in whole.values())
            return {key: sg.unshard(value, spec, mesh, {**sizes, **wide}) for key, (value, spec) in whole.items()}

        meshes.run(f"{dtype}", run)
    meshes.assert_same()


CONVOLUTIONS = {
    "out channels": "X[b,c,h,w] W[o/tp,c,i,j] -> Y[b,o/tp,p,q] + B[o/tp]",
    "in channels": "X[b,c/tp,h,w] W[o,c/tp,i,j] -> Y[b,o,p,q] + B[o]",
    "in channels, scattered": "X[b,c/tp,h,w] W[o,c/tp,i,j] -> Y[b/tp,o,p,q]",
    "batch": "X[b/tp,c,h,w] W[o,c,i,j] -> Y[b/tp,o,p,q] + B[o]",
    "batch, a stored weight": "X[b/tp,c,h,w] W[o/tp,c,i,j] -> Y[b/tp,o,p,q]",
    "groups": "X[b,g/tp,c,h,w] W[g/tp,o,c,i,j] -> Y[b,g/tp,o,p,q]",
}


@distributed(world_size=4)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(world_size: int, name: str) -> None:
    meshes = Meshes({"tp": 4})
    layout = Layout(CONVOLUTIONS[name], spatial=2)
    settings = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    channels = {"b": 12, "c": 4 * 3, "o": 4 * 5, "g": 4}
    sizes = {letter: channels[letter] for letter in layout.letters if letter in channels}
    sizes |= {"h": 6, "w": 9, "i": 3, "j": 2, "p": 3, "q": 7}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        full = operands(layout, sizes, dtype, layout.has_bias)
        meshes.run(f"{dtype}", lambda mesh, full=full: convolved(layout, full, sizes, settings, mesh))
    meshes.assert_same()


def convolved(
    layout: Layout, full: dict[str, Tensor], sizes: dict[str, int], settings: dict[str, Any], mesh: DeviceMesh
) -> dict[str, Tensor]:
    leaves = {name: nn.Parameter(sg.shard(value, layout[name], mesh)) for name, value in full.items() if name != "Y"}
    x, w, *b = leaves.values()
    y = sg.convolve(x, w, layout, mesh, *b, sizes=sizes, **settings)
    y.backward(sg.shard(full["Y"], layout.out, mesh))
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(grads) == len(leaves)
    return {
        name: sg.unshard(value.detach(), layout[name], mesh, sizes=sizes) for name, value in {"Y": y, **grads}.items()
    }


REFUSED = "exact mode: the sum is scattered over"
"""Over several axes, along the dim where they stand as in the letter that is summed: the only kind that is refused."""


@distributed(world_size=4)
def test_random_layouts_have_the_same_bits_or_are_refused_alike(world_size: int) -> None:
    random_layouts({"p": 4, "q": 2, "r": 2}, 15, seed=1)


@pytest.mark.slow
@distributed(world_size=4, timeout=300)
@pytest.mark.parametrize("seed", range(2, 6))
def test_more_random_layouts(world_size: int, seed: int) -> None:
    random_layouts({"p": (2, 4, 6, 12)[seed % 4], "q": (2, 4, 2)[seed % 3], "r": (2, 3)[seed % 2]}, 60, seed)


@distributed(world_size=8, timeout=300)
@pytest.mark.parametrize("seed", [7])
def test_random_layouts_on_eight_ranks(world_size: int, seed: int) -> None:
    random_layouts({"p": 8, "q": 2, "r": 2} if seed % 2 else {"p": 2, "q": 4, "r": 2}, 25, seed)


def random_layouts(pieces: dict[str, int], count: int, seed: int) -> None:
    meshes, rng = Meshes(pieces), random.Random(seed)
    while len(meshes.found) < count:
        layout = random_layout(rng, tuple(pieces), marks=False)
        if not layout.axes or layout.bias.partial or layout.bias.grad_partial:
            continue
        sizes = sizes_for(layout, pieces, rng.randrange(4))
        dtype, wide = rng.choice(list(PRECISION.values()))
        full = operands(layout, sizes, dtype, layout.has_bias or rng.random() < 0.5)
        more = {
            "reduce_dtype": wide,
            "save_gathered": rng.choice([(), ("X",), ("W",), ("X", "W")]),
            "frozen": tuple(name for name in full if name != "Y" and rng.random() < 0.1),
            "how": rng.choice(["at once", "at once", "deferred"]),
        }
        meshes.run(
            f"{len(meshes.found)}: {layout} {sizes} {dtype} {more}",
            partial(multiplied, layout, full, sizes, **more),
        )
    assert meshes.differing() == {}
    refused = meshes.refused()
    assert all(why.startswith(REFUSED) for why in refused.values()), refused
    assert len(refused) <= count / 5, refused


@distributed(world_size=4)
@pytest.mark.parametrize("name", ["row_sequence", *slow("column_sequence", "row", "2d, scattered", "fsdp_tp_sequence")])
def test_as_right_and_as_much_sent_as_without(world_size: int, name: str) -> None:
    """Within the bounds of an ordinary product; where a rank has 2^k pieces of one sum, with the bytes of one."""
    layout = Layout(LAYOUTS[name])
    meshes = Meshes(over(4, layout))
    sizes = {letter: 4 * size for letter, size in sizes_for(layout, meshes.pieces).items()}
    for mesh in meshes.mine.values():
        for dtype, wide in PRECISION.values():
            sent = []
            for pieces in (meshes.pieces, None):
                sg.set_exact(mesh, pieces)
                run = partial(sg.check_product, layout, sizes, mesh, dtype=dtype, bias=True, reduce_dtype=wide)
                run().require()  # in which ranks compare what they mean
                with sg.trace_collectives() as traced:
                    run().require()
                sent.append(sum(event.bytes for event in traced))
            assert sent[0] == sent[1], (mesh, dtype)


@distributed(world_size=2)
@pytest.mark.parametrize(("pieces", "most"), [(2, 1), (4, 2), (8, 3), (16, 4), (32, 5)])
def test_few_sums_are_held_at_a_time(world_size: int, pieces: int, most: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sg.set_exact(mesh, pieces)
    made: list[Piecewise] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardgrad.ops.namespace.Piecewise", lambda *of: made.append(Piecewise(*of)) or made[-1])
        layout = Layout(LAYOUTS["row"])
        sizes = {"n": 3, "d": 32, "m": 5}
        multiplied(layout, operands(layout, sizes, torch.float32, True), sizes, mesh)
    assert max(one.most for one in made) == most
