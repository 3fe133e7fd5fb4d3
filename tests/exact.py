"""Compare a sharded product with the NumPy reference on small integers, where every sum is exact and must be equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad import Layout, TensorSpec
from shardgrad.comm.mesh import view
from shardgrad.ops.reference import add_bias, bias_backward, contract, contract_backward


def integers(spec: TensorSpec, sizes: dict[str, int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A global tensor of random small integers, alike on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, [sizes[letter] for letter in spec.letters], generator=generator).to(dtype)


def assert_same(
    local: Tensor, spec: TensorSpec, expected: Tensor, mesh: DeviceMesh, sizes: dict[str, int], what: str
) -> None:
    """Every element of the assembled tensor equals the expected one; NaN and wrong shapes fail."""
    assert tuple(local.shape) == tuple(sg.shard(expected, TensorSpec(spec.name, spec.dims), mesh).shape), (
        f"shape of {what}"
    )
    full = sg.unshard(local, spec, mesh, {letter: sizes[letter] for letter in spec.letters})
    np.testing.assert_array_equal(full.detach().numpy(), expected.numpy(), err_msg=what)


def reference(layout: Layout, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """Y, dX, dW, db by the NumPy reference, in exact integers."""
    index = {letter: chr(ord("a") + at) for at, letter in enumerate(layout.letters)}
    xs, ws, ys, bs = ("".join(index[letter] for letter in tensor.letters) for tensor in layout.tensors[:4])
    spec = f"{xs},{ws}->{ys}"
    whole = [tensor.numpy().astype(np.int64) for tensor in (x, w, dy)]
    y = contract(whole[0], whole[1], spec)
    if b is not None:
        y = add_bias(y, b.numpy().astype(np.int64), f"{bs}->{ys}")
    dx, dw = contract_backward(*whole, spec)
    made = {"Y": y, "dX": dx, "dW": dw, "db": bias_backward(whole[2], f"{bs}->{ys}")}
    return {name: torch.from_numpy(np.asarray(value)).to(x.dtype) for name, value in made.items()}


def check(
    layout: Layout,
    mesh: DeviceMesh,
    sizes: dict[str, int],
    *,
    seed: int = 0,
    bias: bool | None = None,
    give_sizes: bool = True,
    save_gathered: tuple[str, ...] = (),
    frozen: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Y, dX, dW, db of one call equal the reference, and what was sent equals what was predicted, to the byte."""
    bias = layout.has_bias if bias is None else bias
    x, w, b, dy = (
        integers(tensor, sizes, 10 * seed + at, dtype)
        for at, tensor in enumerate((layout.lhs, layout.rhs, layout.bias, layout.out))
    )
    expected = reference(layout, x, w, b if bias else None, dy)
    names = (layout.lhs.name, layout.rhs.name, layout.bias.name)
    local = [
        sg.shard(full, spec, mesh).requires_grad_(name not in frozen)
        for full, spec, name in zip((x, w, b), (layout.lhs, layout.rhs, layout.bias), names)
    ]
    dy_local = sg.shard(dy, layout.out, mesh)
    for repeat in range(2):  # the first call also compares layouts between ranks
        for tensor in local:
            tensor.grad = None
        with sg.trace_collectives() as traced:
            y = sg.matmul(
                local[0],
                local[1],
                layout,
                mesh,
                bias=local[2] if bias else None,
                sizes=sizes if give_sizes else None,
                save_gathered=save_gathered,
            )
            if y.requires_grad:
                y.backward(dy_local)
        what = f"{layout} with {sizes} on {dict(zip(mesh.mesh_dim_names or (), mesh.shape))}, call {repeat}"
        assert_same(y, layout.out, expected["Y"], mesh, sizes, f"Y of {what}")
        for tensor, spec, name, key in zip(local, (*layout.tensors[:2], layout.bias), names, ("dX", "dW", "db")):
            if name in frozen or (key == "db" and not bias):
                assert tensor.grad is None, f"{key} of {what}"
            else:
                assert tensor.grad is not None, f"{key} of {what}"
                assert_same(tensor.grad, spec.grad, expected[key], mesh, sizes, f"{key} of {what}")
    if give_sizes:
        mesh_names = mesh.mesh_dim_names or ()
        predicted = layout.collectives(
            sizes,
            view(mesh).shape,
            dtype,
            bias=bias,
            frozen=[name for name in frozen if name != names[2] or bias],
            save_gathered=save_gathered,
            coordinate={name: mesh.get_local_rank(name) for name in mesh_names},
        )
        if set(names[: 2 + bias]) <= set(frozen):
            predicted = [entry for entry in predicted if entry.phase == "forward"]
        assert sorted((p.operation, p.axis, p.bytes) for p in predicted) == sorted(
            (event.operation, event.axis, event.bytes) for event in traced
        ), f"sent by {what}"
