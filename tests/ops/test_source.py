"""What a layout compiles to is the code that one would have written by hand."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.layout.layout import Layout
from shardgrad.ops.bound import bind
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
