"""What a layout compiles to is the code that one would have written by hand."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.layout import Layout
from shardgrad.ops.matmul import bind
from shardgrad.testing import distributed

COLUMN = """\
def forward(ctx, x, w, b):
    y = linear(x, w, b)
    ctx.save_for_backward(w, x)
    ctx.set_materialize_grads(False)
    return y

def backward(saved, dy):
    w, x, = saved
    grad0 = dy.mm(w)
    grad0_work = reduce0.start(grad0)
    w = None
    grad1 = dy.t().mm(x)
    x = None
    grad2 = db0(dy)
    dy = None
    reduce0.wait(grad0_work)
    return grad0, grad1, grad2,
"""
ROW_SEQUENCE = """\
def forward(ctx, x, w):
    y = x.mm(w)
    y_sent = scatter0.start(y)
    y, y_sent = scatter0.finish(y_sent), None
    ctx.save_for_backward(x)
    ctx.set_materialize_grads(False)
    return y

def backward(saved, dy):
    x, = saved
    dy__sent = gather0.start(dy)
    dy__here, dy__sent = gather0.finish(dy__sent), None
    grad0 = x.t().mm(dy__here)
    dy__here = x = None
    return None, grad0,
"""


@distributed(world_size=2)
def test_column_parallel_with_everything_wanted(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    product = bind((Layout("X[n,d] W[m/tp,d] -> Y[n,m/tp]"),), (True,), mesh)
    tensors = [torch.zeros(s, requires_grad=True) for s in ((4, 3), (5, 3), (5,))]
    assert product.program(tensors, ()).source == COLUMN
    with torch.no_grad():
        assert "ctx" not in product.program(tensors, ()).source


@distributed(world_size=2)
def test_row_parallel_with_sequence_whose_input_needs_no_gradient(world_size: int) -> None:
    """dY is gathered once, W is not saved."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    product = bind((Layout("X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]"),), (False,), mesh)
    tensors = [torch.zeros(4, 3), torch.zeros(3, 5, requires_grad=True)]
    assert product.program(tensors, ()).source == ROW_SEQUENCE
