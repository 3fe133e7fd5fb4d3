"""What runs is the text that `Layout.program` prints, and it is what one would have written by hand."""

from __future__ import annotations

import itertools
import linecache
import traceback

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.comm.collectives import AllReduce
from shardgrad.layout.layout import Layout
from shardgrad.layout.presets import PRESETS
from shardgrad.ops.bound import bind
from shardgrad.ops.convolve import Convolution
from shardgrad.testing import distributed

COLUMN = """\
def forward(ctx, x, w, b):
    y = linear(x, w, b)
    ctx.save_for_backward(x, w)
    ctx.set_materialize_grads(False)
    return y

def backward(dy, x, w):
    dx = dy.mm(w)
    dx = all_reduce_dx_tp.start(dx)
    dw = dy.t().mm(x)
    db = dy.sum(0)
    dx = all_reduce_dx_tp.wait(dx)
    return dx, dw, db
"""
ROW_SEQUENCE = """\
def forward(ctx, x, w):
    y = x.mm(w)
    y = reduce_scatter_y_tp(y)
    ctx.save_for_backward(x)
    ctx.set_materialize_grads(False)
    return y

def backward(dy, x):
    dy_full = all_gather_dy_tp(dy)
    dw = x.t().mm(dy_full)
    return None, dw
"""


@distributed(world_size=2)
def test_column_parallel_with_everything_wanted(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    product = bind((Layout("X[n,d] W[m/tp,d] -> Y[n,m/tp]"),), (True,), mesh)
    tensors = [torch.zeros(s, requires_grad=True) for s in ((4, 3), (5, 3), (5,))]
    assert product.executable(tensors, ()).source == COLUMN
    with torch.no_grad():
        assert "ctx" not in product.executable(tensors, ()).source


@distributed(world_size=2)
def test_row_parallel_with_sequence_whose_input_needs_no_gradient(world_size: int) -> None:
    """dY is gathered once, W is not saved."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    product = bind((Layout("X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]"),), (False,), mesh)
    tensors = [torch.zeros(4, 3), torch.zeros(3, 5, requires_grad=True)]
    assert product.executable(tensors, ()).source == ROW_SEQUENCE


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("save_gathered", [False, True])
def test_what_runs_is_what_is_printed(world_size: int, name: str, save_gathered: bool) -> None:
    layout = PRESETS[name]
    shape = dict.fromkeys(layout.axes, 1) | {layout.axes[-1]: world_size}
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    sizes = dict(zip(layout.letters, (7, 5, 9, 4)))
    saved = (layout.lhs.name, layout.rhs.name) if save_gathered else ()
    for bias, frozen in itertools.product((False, True), ((), ("X",), (layout.rhs.name,))):
        specs = (layout.lhs, layout.rhs, layout.bias)[: 2 + bias]
        tensors = [
            sg.shard(torch.zeros([sizes[x] for x in spec.letters]), spec, mesh).requires_grad_(spec.name not in frozen)
            for spec in specs
        ]
        bound = bind((layout,), (bias,), mesh, saved)
        executable = bound.executable(tensors, tuple(sizes.items()))
        given = {"bias": bias, "frozen": [n for n in frozen if n in [s.name for s in specs]], "save_gathered": saved}
        assert executable.source == layout.program(shape, **given)
        assert "".join(linecache.getlines(executable._forward.__code__.co_filename)) in executable.source


@distributed(world_size=2)
def test_a_convolution_and_a_wider_reduction(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layout = Layout("X[b,c/tp,h,w] W[o,c/tp,i,j] -> Y[b,o,p,q] + B[o]", spatial=2)
    bound = bind((layout,), (True,), mesh, operation=Convolution.of(layout, 1, 0, 1))
    tensors = [torch.zeros(s, requires_grad=True) for s in ((2, 3, 4, 4), (5, 3, 2, 2), (5,))]
    assert bound.executable(tensors, ()).source == layout.program()
    column = PRESETS["column"]
    bound = bind((column,), (False,), mesh, (), torch.float32)
    wide = [torch.zeros(s, dtype=torch.bfloat16, requires_grad=True) for s in ((4, 3), (3, 5))]
    assert bound.executable(wide, ()).source == column.program(dtype=torch.bfloat16, reduce_dtype=torch.float32)


@distributed(world_size=2)
def test_a_traceback_shows_the_line_of_the_program(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    x, w = (torch.ones(s, requires_grad=True) for s in ((2, 3), (3, 2)))
    y = sg.matmul(x, w, PRESETS["column"], mesh)

    def planted(self: AllReduce, x: torch.Tensor) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(AllReduce, "start", planted)
    with pytest.raises(ZeroDivisionError, match="planted") as caught:
        y.sum().backward()
    told = "".join(traceback.format_exception(caught.value))
    assert "in backward\n    dx = all_reduce_dx_tp.start(dx)\n" in told
    assert "<shardgrad backward: X[n,d] W[d,m/tp] -> Y[n,m/tp]>" in told
