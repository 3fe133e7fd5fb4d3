"""Products handed to torch's fused ones over symmetric memory; what is not handed over says why.

On CPUs torch's own fallbacks stand in: they take the same arguments, communicate, and multiply.
"""

from __future__ import annotations

import pytest
import torch
from exact import check
from fused_on_cpu import fused_on_cpu
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.layout.layout import Layout
from shardgrad.testing import distributed

SIZES = {"b": 3, "n": 12, "s": 24, "d": 24, "m": 12, "k": 5}
GATHER, REDUCE = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"
# layout -> which products are fused: those of forward, and those of backward
LAYOUTS = {
    "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]": ([GATHER], [REDUCE]),
    "X[b,s/tp,d] W[m/tp,d] -> Y[b,s,m/tp]": ([GATHER], [REDUCE]),
    "X[s/tp,b,d] W[m/tp,k,d] -> Y[s,b,m/tp,k]": ([GATHER], [REDUCE]),
    "X[b,s/tp,d,k] W[m/tp,d,k] -> Y[b,s,m/tp]": ([GATHER], [REDUCE]),
    "X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]": ([REDUCE], [GATHER]),
    "X[b,s,d/tp] W[m,d/tp] -> Y[b,s/tp,m]": ([REDUCE], [GATHER]),
    "X[n,d/tp] W[d/tp,m] -> Y[n,m]": ([], []),
    "X[n,d] W[d,m/tp] -> Y[n,m/tp]": ([], []),
    "X[n,d/tp] W[d/tp,m] -> Y[n,m/tp]": ([], []),  # Y is scattered, and dY gathered, along columns
    "X[n/tp,d] W[m,d/tp] -> Y[n/tp,m]": ([], []),
}


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("text", LAYOUTS)
def test_the_same_product_fused(world_size: int, text: str) -> None:
    """Also to the byte: `check` compares what was sent with what was predicted."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout(text)
    sizes = {letter: SIZES[letter] for letter in layout.letters}
    with fused_on_cpu() as called:
        sg.set_overlap(mesh, "symm_mem")
        forward, backward = LAYOUTS[text]
        for save_gathered in ((), (layout.lhs.name,)):
            for bias in (False, True):
                called.clear()
                check(layout, mesh, sizes, bias=bias, save_gathered=save_gathered)
                assert called == 2 * [*forward, *backward]  # it runs twice
        decisions = sg.overlap_decisions(mesh)
        assert {one.how for one in decisions if one.how != "whole"} == ({"symm_mem"} if forward + backward else set())
        assert all(one.why for one in decisions if one.how == "whole")
        assert len(decisions) >= len(layout.collectives(sizes, {"tp": world_size}))
        called.clear()
        sg.set_overlap(mesh, None)
        check(layout, mesh, sizes)
        assert not called
        assert sg.overlap_decisions(mesh) == []


@distributed(world_size=[2, 3])
@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]", {"n": 7, "d": 6, "m": 12}),  # rows that do not divide
        ("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]", {"n": 0, "d": 6, "m": 12}),
        ("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]", {"n": 12, "d": 6, "m": 1}),  # ranks that have no columns
        ("X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]", {"n": 12, "d": 5, "m": 7}),
        ("X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]", {"n": 5, "d": 12, "m": 7}),
    ],
)
def test_uneven_and_empty_sizes(world_size: int, text: str, sizes: dict[str, int]) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    with fused_on_cpu() as called:
        sg.set_overlap(mesh, "symm_mem")
        check(Layout(text), mesh, sizes)
        assert bool(called) == (sizes["n"] == 12)
        if sizes["n"] != 12:
            reasons = {one.why for one in sg.overlap_decisions(mesh)}
            assert reasons & {"its shards are not of one size", "it is empty"}
        sg.set_overlap(mesh, None)


@distributed(world_size=[2, 3])
def test_products_that_share_a_gather_and_weights_gradients(world_size: int) -> None:
    """Layers: gate and up of one gather; Y changed in place; dW deferred and reduce-scattered."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(3)
    block = sg.SwiGLU(12, 24, mesh=mesh, sequence_dim=1, dtype=torch.float64)
    x = torch.randn(2, 6 // world_size, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 6 // world_size, 12, dtype=torch.float64)

    def once() -> list[torch.Tensor]:
        x.grad = None
        block.zero_grad()
        y = block(x)
        y.add_(1)  # a result is a tensor of its own
        y.backward(dy)
        grads = [x.grad, *(parameter.grad for parameter in block.parameters())]
        return [y.detach().clone(), *(grad.clone() for grad in grads if grad is not None)]

    usual = once()
    with fused_on_cpu() as called:
        sg.set_overlap(mesh, "symm_mem")
        fused = once()
        assert called == [GATHER, REDUCE, GATHER]  # dX of gate and up is one sum of two products
        sg.set_overlap(mesh, None)
    assert len(usual) == len(fused) == 5
    for one, other in zip(usual, fused):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    weight = nn.Parameter(torch.randn(6, 4))
    layout = Layout("X[n/tp,d] W[m/tp,d] -> Y[n/tp,m]")
    x2, dy2 = torch.randn(5, 4), torch.randn(5, 6 * world_size)
    grads = []
    for how in (None, "symm_mem"):
        weight.grad = None
        with fused_on_cpu() as called:
            sg.set_overlap(mesh, how)
            with sg.defer_weight_grads() as later:
                sg.matmul(x2, weight, layout, mesh, sizes={"n": 5 * world_size}).backward(dy2)
                later.run()
            assert called == ([REDUCE] if how else [])
            sg.set_overlap(mesh, None)
        assert weight.grad is not None
        grads.append(weight.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@distributed(world_size=[1, 2])
def test_where_it_would_do_nothing_it_says_why(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    if world_size > 1:
        with pytest.raises(ValueError, match=r"axis 'tp': its tensors are on cpu.*CUDA alone.*measure_costs"):
            sg.set_overlap(mesh, "symm_mem")
        sg.set_overlap(mesh, 2)
        with pytest.raises(ValueError, match="would do nothing"):
            sg.set_overlap(mesh, "symm_mem")
        x, w = (torch.randn(size, requires_grad=True) for size in ((4, 5), (5, 3)))
        y = sg.matmul(x, w, Layout("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]"), mesh)
        y.backward(torch.randn(8, 3))
        hows = [one.how for one in sg.overlap_decisions(mesh)]  # what was set before still holds
        assert hows.count("2 chunks") == 2
    with pytest.raises(ValueError, match="not 'symmetric'"):
        sg.set_overlap(mesh, "symmetric")  # type: ignore[arg-type]
    sg.set_overlap(mesh, None)


@distributed(world_size=4)
def test_an_axis_without_it_stays_whole_and_says_why(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with fused_on_cpu() as called:
        monkeypatch.setattr(
            "shardgrad.comm.fused._lack", lambda axis, _: "several hosts" if axis.name == "tp" else None
        )
        sg.set_overlap(mesh, "symm_mem")
        check(Layout("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]"), mesh, {"n": 8, "d": 4, "m": 6})
        assert not called
        whys = [one.why for one in sg.overlap_decisions(mesh)]
        assert whys.count("several hosts") == 2
        check(Layout("X[n/dp,d] W[d,m/dp] -> Y[n,m/dp]"), mesh, {"n": 8, "d": 4, "m": 6})
        assert called == 2 * [GATHER, REDUCE]
        sg.set_overlap(mesh, None)


@distributed(world_size=2)
def test_products_of_one_input_with_different_rows_are_not_one_call(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layouts = [Layout("X[n/tp,k,d] W[k,d,m/tp] -> Y[n,m/tp]"), Layout("X[n/tp,k,d] W[d,m/tp] -> Y[n,k,m/tp]")]
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    weights = [torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)]
    usual = sg.matmul(x, list(zip(weights, layouts)), mesh, sizes={"n": 6})
    with fused_on_cpu() as called:
        sg.set_overlap(mesh, "symm_mem")
        found = sg.matmul(x, list(zip(weights, layouts)), mesh, sizes={"n": 6})
        assert not called
        assert [one.why for one in sg.overlap_decisions(mesh)] == ["its products have different rows"]
        sg.set_overlap(mesh, None)
    for one, other in zip(usual, found):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
