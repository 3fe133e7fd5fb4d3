"""The product to a vocabulary and its loss in one, in exact mode: the same bits on every number of ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from bits import Meshes, normal
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.layout.tree import TreeSum
from shardgrad.nn.linear_loss import linear_loss_collectives
from shardgrad.ops.bound import bind
from shardgrad.testing import distributed

PIECES = {"dp": 2, "tp": 4}
LAYOUTS = {
    "sequence": "X[b/dp,s/tp,d] W[v/tp,d] -> Z[b/dp,s,v/tp]",
    "data": "X[b/dp,s,d] W[v/tp,d] -> Z[b/dp,s,v/tp]",
    "fully sharded": "X[b/dp,s/tp,d] W[v/tp,d/dp] -> Z[b/dp,s,v/tp]",
    "replicated": "X[b,s,d] W[v/tp,d] -> Z[b,s,v/tp]",
}
SIZES = {"b": 6, "s": 12, "d": 20, "v": 4 * 13}


def run(mesh: DeviceMesh, layout: sg.Layout, dtype: torch.dtype, micro: int = 1, **how: Any) -> dict[str, Tensor]:
    """Loss, dW and db, whole."""
    specs = (layout.lhs, layout.rhs, layout.bias)
    shapes = [[SIZES[a] for a in spec.letters] for spec in specs]
    full = [normal(*shape, seed=at, dtype=dtype) for at, shape in enumerate(shapes)]
    target = torch.randint(0, SIZES["v"], (6, 12), generator=torch.Generator().manual_seed(4))
    target[0, :2], target[4:] = -100, -100
    rows = sg.TensorSpec("T", layout.out.dims[:2])
    w, b = (nn.Parameter(sg.shard(one, spec, mesh)) for one, spec in zip(full[1:], specs[1:]))
    x = full[0].requires_grad_()
    parts = TreeSum[Tensor](micro, torch.add)
    for at in sg.micro_batches(mesh, micro):
        mine = sg.shard(x.chunk(micro)[at], layout.lhs, mesh)
        loss = sg.linear_cross_entropy(
            mine,
            w,
            sg.shard(target.chunk(micro)[at], rows, mesh),
            layout,
            mesh,
            b,
            vocab_size=SIZES["v"],
            chunk_tokens=5,
            reduce_dtype=torch.float32 if dtype == torch.bfloat16 else None,
            **how,
        )
        loss.backward()
        parts.push((at, at + 1), loss.detach())
    assert w.grad is not None
    assert b.grad is not None
    found = {
        "loss": parts.values[0],
        "dW": sg.unshard(w.grad, layout.rhs, mesh),
        "db": sg.unshard(b.grad, layout.bias, mesh),
    }
    return found


@pytest.mark.slow
@distributed(world_size=4)
@pytest.mark.parametrize("grads", ["backward", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_same_bits(world_size: int, grads: str, dtype: torch.dtype) -> None:
    meshes = Meshes(PIECES)
    for name, text in LAYOUTS.items():
        layout = sg.Layout(text)

        def compute(mesh: DeviceMesh, layout: sg.Layout = layout) -> dict[str, Tensor]:
            more: dict[str, Any] = {"grads": grads, "label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 3.0}
            found = run(mesh, layout, dtype, **more)
            x = sg.shard(normal(6, 12, 20, seed=0, dtype=dtype), layout.lhs, mesh).requires_grad_()
            w = sg.shard(normal(4 * 13, 20, seed=1, dtype=dtype), layout.rhs, mesh)
            target = torch.arange(72).view(6, 12) % SIZES["v"]
            mine = sg.shard(target, sg.TensorSpec("T", layout.out.dims[:2]), mesh)
            sg.linear_cross_entropy(
                x,
                w,
                mine,
                layout,
                mesh,
                vocab_size=SIZES["v"],
                chunk_tokens=5,
                grads=grads,  # type: ignore[arg-type]
            ).backward()
            assert x.grad is not None
            return {**found, "dX": sg.unshard(x.grad, layout.lhs, mesh)}

        meshes.run(name, compute)
    meshes.assert_same()


@distributed(world_size=4)
def test_micro_batches_are_pieces(world_size: int) -> None:
    """Two micro-batches on one rank of dp have the bits of two ranks."""
    layout = sg.Layout(LAYOUTS["sequence"])
    found: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for grid, micro in (((1, 1), 1), ((1, 4), 2), ((2, 2), 1)):
        mesh = DeviceMesh("cpu", torch.arange(grid[0] * grid[1]).view(grid), mesh_dim_names=("dp", "tp"))
        if torch.distributed.get_rank() < grid[0] * grid[1]:
            sg.set_exact(mesh, PIECES)
            found[grid, micro] = run(mesh, layout, torch.float32, micro, reduction="sum")  # type: ignore[index]
    first = found[(1, 4), 2]  # type: ignore[index]
    for other in found.values():
        for name, value in other.items():
            assert torch.equal(value, first[name]), name


@distributed(world_size=2)
def test_what_cannot_be_exact_is_refused(world_size: int) -> None:
    mesh = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("dp", "tp"))
    sg.set_exact(mesh, PIECES)
    target = torch.zeros(3, 4, dtype=torch.long)
    for text, why in (
        ("X[s,b/dp,d] W[v/tp,d] -> Z[s,b/dp,v/tp]", "whose tokens are sharded on another dim than the first"),
        ("X[b/dp,s,d] W[v/tp,d]{dp} -> Z[b/dp,s,v/tp]", "leaves to the caller"),
        ("X[b/dp,s,d] W[v/tp/dp,d] -> Z[b/dp,s,v/tp]", "cannot be exact"),
    ):
        layout = sg.Layout(text)
        x, w = torch.zeros(3, 4, 8), torch.zeros(52, 8).chunk(2 if "v/tp/dp" in text else 1)[0]
        with pytest.raises(sg.LayoutError, match=why):
            sg.linear_cross_entropy(x, w, target, layout, mesh, vocab_size=52)


@distributed(world_size=4)
@pytest.mark.parametrize("grads", ["backward", "forward"])
def test_what_is_sent_is_predicted(world_size: int, grads: Any) -> None:
    layout = sg.Layout(LAYOUTS["sequence"])
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    sg.set_exact(mesh, PIECES)
    shapes = [[SIZES[a] for a in spec.letters] for spec in (layout.lhs, layout.rhs, layout.bias)]
    specs = (layout.lhs, layout.rhs, layout.bias)
    x, w, b = (sg.shard(normal(*shape, seed=1), spec, mesh).requires_grad_() for shape, spec in zip(shapes, specs))
    target = torch.zeros(3, 12, dtype=torch.long)
    for _ in range(2):
        with sg.trace_collectives() as trace:
            sg.linear_cross_entropy(
                x, w, target, layout, mesh, b, vocab_size=SIZES["v"], chunk_tokens=5, grads=grads
            ).backward()
    here = view(mesh)
    kept = ("X", "W") if grads == "forward" else ()
    sizes = layout.resolve(SIZES, here.shape, here.coordinate)
    expected = bind((layout,), (True,), mesh, kept).collectives(sizes, "float32")
    expected += linear_loss_collectives(
        36, "float32", mesh=mesh, vocab_size=SIZES["v"], token_axes=("dp",), chunk_tokens=5
    )
    sums: Counter[tuple[str, str]] = Counter()
    for one in expected:
        sums[one.operation, one.axis] += one.bytes
    assert {key: size for key, (_, size) in trace.totals().items()} == sums
