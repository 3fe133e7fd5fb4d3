"""A product done in chunks beside its communication is the same product, and is split only where that pays."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from exact import check, integers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.layout.layout import Layout
from shardgrad.ops.overlap import WHOLE, Chunking, Costs, Link
from shardgrad.testing import distributed

SIZES = {"b": 3, "n": 12, "s": 24, "d": 24, "m": 12, "k": 5}
# layout -> whether forward, and backward, are in chunks
LAYOUTS = {
    "X[n,d/tp] W[d/tp,m] -> Y[n,m]": (True, False),
    "X[n,d/tp] W[m,d/tp] -> Y[n,m]": (True, False),
    "X[b,s,d/tp] W[m,d/tp] -> Y[b,s,m]": (True, False),
    "X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]": (True, True),
    "X[b,s,d/tp] W[m,d/tp] -> Y[b,s/tp,m]": (True, True),
    "X[b,s,d/tp] W[m,d/tp] -> Y[b/tp,s,m]": (False, False),  # 3 rows over tp are sharded evenly by 1 and 3 ranks only
    "X[b,s,d/tp,k] W[m,d/tp,k] -> Y[b,s/tp,m]": (True, True),
    "X[b,s,d/tp] W[m,d/tp] -> Y[b,s,m/tp]": (True, False),  # summed along a column dim: split along two row dims as one
    "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]": (True, True),
    "X[b,s/tp,d] W[m/tp,d] -> Y[b,s,m/tp]": (True, True),
    "X[b,s/tp,d] W[m/tp,k,d] -> Y[b,s,m/tp,k]": (True, True),
    "X[n,d] W[d,m/tp] -> Y[n,m/tp]": (False, True),
    # Fully sharded. In backward dW comes first: W is gathered under it, and it is reduced under dX.
    "X[n/tp,d] W[d,m] -> Y[n/tp,m]": (False, False),
    "X[n/tp,d] W[d/tp,m] -> Y[n/tp,m]": (True, False),
    "X[n/tp,d] W[m/tp,d] -> Y[n/tp,m]": (True, False),
    "X[n/tp,d] W[m,d/tp] -> Y[n/tp,m]": (True, False),
    "X[b,s/tp,d] W[m,k,d/tp] -> Y[b,s/tp,m,k]": (True, False),
    "X[b,s/tp,d] W[m/tp,k,d] -> Y[b,s/tp,m,k]": (True, False),
    "X[d/tp,n] W[d/tp,m] -> Y[n,m]": (True, False),
    "X[n,d/tp] W[d/tp,m] -> Y[m,n]": (True, False),
}


def sharded(layout: Layout, sizes: dict[str, int], mesh: DeviceMesh) -> list[torch.Tensor]:
    """This rank's X, W and dY, of integers."""
    specs = (layout.lhs, layout.rhs, layout.out)
    return [sg.shard(integers(spec, sizes, at), spec, mesh) for at, spec in enumerate(specs)]


def once(
    x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, layout: Layout, mesh: DeviceMesh, sizes: dict[str, int] | None
) -> tuple[list[torch.Tensor], list[int]]:
    """Y, dX and dW; how many collectives forward had, and backward."""
    leaves = nn.Parameter(x.clone()), nn.Parameter(w.clone())
    with sg.trace_collectives() as forward:
        y = sg.matmul(*leaves, layout, mesh, sizes=sizes)
    with sg.trace_collectives() as backward:
        y.backward(dy)
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [y.detach(), *grads], [len(forward), len(backward)]


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("text", LAYOUTS)
def test_the_same_product_in_chunks(world_size: int, text: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = Layout(text)
    sizes = {letter: SIZES[letter] for letter in layout.letters}
    shards = x, w, dy = sharded(layout, sizes, mesh)

    run = partial(once, *shards, layout, mesh, sizes)
    run()  # in which ranks compare what they mean
    whole, usual = run()
    assert len(whole) == 3
    for pieces in (1, 3, 5):
        sg.set_overlap(mesh, pieces)
        cut, counts = run()
        for one, other in zip(whole, cut):
            assert torch.equal(one, other)
        again = nn.Parameter(x.clone())
        for save_gathered in ((layout.lhs.name,), (layout.lhs.name, layout.rhs.name)):
            again.grad = None
            # No gradient of W: dX comes last.
            y = sg.matmul(again, w, layout, mesh, sizes=sizes, save_gathered=save_gathered)
            y.backward(dy)
            assert again.grad is not None
            assert torch.equal(y, whole[0])
            assert torch.equal(again.grad, whole[1])
        if "b/tp" not in text:
            expected = [cuts and world_size > 1 and pieces > 1 for cuts in LAYOUTS[text]]
            assert [now > before for now, before in zip(counts, usual)] == expected
    sg.set_overlap(mesh, None)
    assert run()[1] == usual


# Where dX is reduced over tp, W is gathered beside dX, and dW is reduced beside itself: (forward, backward) in chunks.
FULLY_SHARDED = {
    "X[n/dp,d] W[m/tp,d/dp] -> Y[n/dp,m/tp]": (True, True),
    "X[n/dp,d] W[d/dp,m/tp] -> Y[n/dp,m/tp]": (True, True),
    "X[n/dp,d] W[m/tp/dp,d] -> Y[n/dp,m/tp]": (True, True),
    "X[n/dp,d] W[m/tp,d] -> Y[n/dp,m/tp]": (False, True),
    "X[n/dp,d] W[d,m/tp] -> Y[n/dp,m/tp]": (False, True),
    "X[b/dp,s,d] W[m/tp,d/dp] -> Y[b/dp,s,m/tp]": (True, True),
}


@distributed(world_size=4)
@pytest.mark.parametrize("n", [12, 7, 1])
@pytest.mark.parametrize("text", FULLY_SHARDED)
def test_gathers_of_weights_and_reductions_of_their_gradients(world_size: int, text: str, n: int) -> None:
    """Also where ranks have different numbers of rows, some none, and so would decide differently if each decided
    alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layout = Layout(text)
    sizes = {letter: {"n": n, "b": n, "s": 3, "d": 24, "m": 12}[letter] for letter in layout.letters}
    shards = sharded(layout, sizes, mesh)

    run = partial(once, *shards, layout, mesh, None)
    run()
    whole, usual = run()
    assert len(whole) == 3
    links = {axis: Link(1e-9, 1e-3, 1.0) for axis in ("dp", "tp")}
    costs = Costs(links, {torch.float32: 1e-4 if mesh["dp"].get_local_rank() == 0 else 1e-9})
    for how in (3, costs):
        sg.set_overlap(mesh, how)
        run()
        cut, counts = run()
        assert len(cut) == 3
        for one, other in zip(whole, cut):
            assert torch.equal(one, other)
        if n > 1 or how == 3:  # a single row is too little to hide anything behind
            assert [now > before for now, before in zip(counts, usual)] == list(FULLY_SHARDED[text])
    sg.set_overlap(mesh, None)


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("save_gathered", [(), ("X",)])
def test_products_that_share_a_gather(world_size: int, save_gathered: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layouts = [Layout(f"X[b,s/tp,d] W{i}[{h}/tp,k,d] -> Y{i}[b,s,{h}/tp,k]") for i, h in enumerate("hij")]
    sizes = {"b": 2, "s": 12, "d": 7, "k": 3, "h": 12, "i": 6, "j": 6}
    x = sg.shard(integers(layouts[0].lhs, sizes, 9), layouts[0].lhs, mesh)
    ws = [sg.shard(integers(lay.rhs, sizes, at), lay.rhs, mesh) for at, lay in enumerate(layouts)]
    dys = [sg.shard(integers(lay.out, sizes, 5 + at), lay.out, mesh) for at, lay in enumerate(layouts)]
    found = []
    for pieces in (None, 2):
        sg.set_overlap(mesh, pieces)
        leaves = [nn.Parameter(t.clone()) for t in (x, *ws)]
        ys = sg.matmul(leaves[0], list(zip(leaves[1:], layouts)), mesh, sizes=sizes, save_gathered=save_gathered)
        torch.autograd.backward(ys, dys)
        found.append([*ys, *(leaf.grad for leaf in leaves)])
    sg.set_overlap(mesh, None)
    for whole, cut in zip(*found):
        assert whole is not None
        assert cut is not None
        assert torch.equal(whole, cut)


@distributed(world_size=[2, 4])
@pytest.mark.parametrize(
    "text", ["X[n,d/tp] W[d/tp,m] -> Y[n,m]", "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]", "X[n,d/tp] W[d/tp,m] -> Y[n/tp,m]"]
)
def test_sizes_that_do_not_divide_and_empty_ones_are_not_cut(world_size: int, text: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    sg.set_overlap(mesh, 3)
    for sizes in (
        {"n": 5, "d": 7, "m": 3},
        {"n": 5, "d": 8, "m": 0},
        {"n": 0, "d": 8, "m": 4},
    ):
        if sizes["d"] == 8 or text != "X[n,d/tp] W[d/tp,m] -> Y[n,m]":  # whose Y is whole on every rank, whatever d is
            check(Layout(text), mesh, sizes)
    sg.set_overlap(mesh, None)


@distributed(world_size=4, backend="late")
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "X[n/a,d/b] W[d/b/a,m] -> Y[n/a/b,m]",
        "X[n/a/b,d] W[d/a,m/b] -> Y[n/a,m/b]",
        "X[n/a,d/b] W[d/a,m/b] -> Y[n/a,m/b]",
    ],
)
def test_ranks_of_one_axis_with_sizes_that_divide_on_another_for_some(world_size: int, text: str, told: bool) -> None:
    """11 rows are 6 and 5 over `a`, and of these 6 alone are even over `b`: all must chunk the same collectives over
    `a`."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    layout = Layout(text)
    sizes = {"n": 11, "d": 8, "m": 10}
    given = sizes if told else None
    shards = sharded(layout, sizes, mesh)
    whole, _ = once(*shards, layout, mesh, given)
    sg.set_overlap(mesh, 3)
    for one, other in zip(whole, once(*shards, layout, mesh, given)[0], strict=True):
        assert torch.equal(one, other)


@distributed(world_size=4)
def test_one_collective_is_chunked_where_another_cannot_be_on_any_rank(world_size: int) -> None:
    """10 rows are 5 and 5 over `a`, none of which are even over `b`: the ranks of `a` decide alike."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    layout, sizes = Layout("X[n/a,d/b] W[d/b/a,m] -> Y[n/a/b,m]"), {"n": 10, "d": 8, "m": 9}
    shards = sharded(layout, sizes, mesh)
    once(*shards, layout, mesh, sizes)
    sg.set_overlap(mesh, 3)
    assert once(*shards, layout, mesh, sizes)[1][0] == 3 + 1


def test_the_number_of_pieces_follows_from_the_costs() -> None:
    """Communication of 10 ms and a product of 10 ms that can hide it wholly: 6 chunks leave 1/6 of it in sight."""
    f32 = torch.float32
    costs = Costs({"tp": Link(1e-5, 1e-8, 1.0)}, {f32: 1e-11})
    work = ("tp", 10**6, 10**9, 0, f32)
    assert costs.chunks(*work, None) == Chunking(6)
    assert costs.chunks(*work, 0.5).count > 1
    assert costs.chunks(*work, 0.0).count > 1
    slow = Costs({"tp": Link(6e-3, 1e-8, 1.0)}, {f32: 1e-11})  # each chunk more costs 6 ms
    assert slow.chunks(*work, None) == WHOLE
    # dW's product takes as long as dX's reduction.
    assert costs.chunks(*work, None, following_flops=10**9 + 10**7) == WHOLE
    assert 1 < costs.chunks(*work, None, following_flops=5 * 10**8).count < 6
    none = Costs({"tp": Link(1e-5, 1e-8, 0.0)}, {f32: 1e-11})  # nothing runs side by side
    assert none.chunks(*work, None) == WHOLE
    assert none.chunks(*work, 0.5) == WHOLE
    again = Costs({"tp": Link(1e-5, 1e-8, 1.0)}, {f32: 1e-11}, {f32: 1e-9})
    assert again.chunks("tp", 10**6, 10**9, 10**6, f32, None).count < 8  # each chunk more reads for 1 ms
    assert again.chunks("tp", 10**6, 10**9, 10**7, f32, None) == WHOLE
    each = Costs({"tp": Link(1e-5, 1e-8, 1.0, 1e-3)}, {f32: 1e-11})  # each collective takes 1 ms of the product's
    assert 1 < each.chunks(*work, None).count < 8
    assert 1 <= each.chunks(*work, 0.5).count < costs.chunks(*work, 0.5).count
    assert costs.chunks("tp", 10**6, 10**5, 0, f32, None) == WHOLE  # nothing to hide behind
    assert costs.chunks("dp", 10**6, 10**9, 0, f32, None) == WHOLE  # not measured
    assert costs.chunks("tp", 10**6, 10**9, 0, torch.float16, 0.5) == WHOLE


def test_pieces_shrink_where_their_communication_is_the_shorter() -> None:
    """A product of 10 ms, of which each chunk takes half as long to send: the next may have half its size."""
    costs = Costs({"tp": Link(1e-5, 5e-9, 1.0)}, {torch.float32: 1e-11})
    cut = costs.chunks("tp", 10**6, 10**9, 0, torch.float32, None)
    assert cut.steepness == 500
    pieces = cut.chunks(1000)
    assert pieces[0][0] == 0
    assert all(start + length == following for (start, length), (following, _) in pairwise(pieces))
    assert sum(length for _, length in pieces) == 1000
    assert all(length > 1.5 * shorter for (_, length), (_, shorter) in pairwise(pieces[:4]))
    assert Chunking(3).chunks(2) == [(0, 1), (1, 1)]


@distributed(world_size=1)
def test_less_than_one_chunk_is_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    with pytest.raises(ValueError, match="at least 1 chunk"):
        sg.set_overlap(mesh, 0)
