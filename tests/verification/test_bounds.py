"""Bounds that right code keeps and wrong code leaves: every element of Y, dX, dW and db."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from math import inf, nan
from typing import Any

import pytest
import torch
from many import case
from planted import BUGS, NARROW_ONLY, Case, applies, ratio
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.comm import collectives
from shardgrad.layout import lower, program
from shardgrad.layout.printer import Printed
from shardgrad.layout.schedule import AddBias, Instruction, Instructions
from shardgrad.ops.namespace import Namespace
from shardgrad.testing import distributed
from shardgrad.verification import oracle
from shardgrad.verification.arithmetic import DIGITS, computed, local
from shardgrad.verification.bounds import bounded
from shardgrad.verification.product import operands

ROW = "X[n,d/tp] W[d/tp,m] -> Y[n,m] + B[m]"
SIZES = {"n": 5, "d": 23, "m": 7}
DTYPES = list(DIGITS)


@distributed(world_size=[1, 2, 3, 4], timeout=120)
def test_right_code_stays_within_its_bounds(world_size: int) -> None:
    """Random legal layouts, grids, dtypes, reduction dtypes, uneven and empty shards; many.py runs thousands."""
    rng = random.Random(world_size)
    for _ in range(40):
        case(rng, world_size).require()


@pytest.mark.parametrize("k", [16, 256])
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_leave_their_bounds(bug: str, k: int) -> None:
    """Smallest ratios measured are in docs/bounds.md; what 16 bits cannot tell is there, and here."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if not applies(bug, dtype):
            continue
        blind = bug in NARROW_ONLY or (bug == "one column off by 1 %" and dtype == torch.bfloat16)
        found = []
        for seed in range(5):
            one = Case(k, dtype, seed)
            assert ratio(one, one.right()) < 1
            assert ratio(one, one.right(), lam=6.0) < 1
            found.append(ratio(one, BUGS[bug](one)))
        assert (min(found) > 1) != blind, (dtype, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_16_bit_are_seen_where_nothing_cancels(dtype: torch.dtype) -> None:
    """One by one, a sum of 4096 ones in bf16 stops at 256, in fp16 at 2048."""
    x, w = torch.ones(1, 4096, dtype=dtype), torch.ones(4096, 1, dtype=dtype)
    stuck = torch.full((1, 1), 2.0 ** DIGITS[dtype], dtype=dtype)
    assert sg.within_bound(stuck, x, w, "X[n,d] W[d,m] -> Y[n,m]").ratio > 10
    assert sg.within_bound(x @ w, x, w, "X[n,d] W[d,m] -> Y[n,m]").ok


def without(kind: type[Instruction], instructions: Instructions) -> Instructions:
    return tuple(one for one in instructions if not isinstance(one, kind))


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact", [True, False])
def test_real_collectives_dropped_doubled_and_exchanged_are_found(
    world_size: int, dtype: torch.dtype, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = "X[n,d/tp] W[d/tp,m] -> Y[n/tp,m] + B[m]"
    column = "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp] + B[m/tp]"
    begin = collectives.AllReduce._begin
    scatter, gathered = collectives.ReduceScatter.start, collectives.AllGather.wait

    def run(layout: str) -> sg.ProductCheck:
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))  # of its own: nothing is compiled for it
        return sg.check_product(layout, SIZES, mesh, dtype=dtype, exact=exact, seed=3)

    for layout in (ROW, sequence, column):
        assert run(layout).require().ok
    with monkeypatch.context() as patch:  # no reduction at all
        patch.setattr(collectives.AllReduce, "_begin", lambda self, *given: None)
        assert {name for name, worst in run(ROW).worst.items() if not worst.ok} == {"Y"}
    with monkeypatch.context() as patch:  # reduced twice

        def twice(self: collectives.AllReduce, *given: Any) -> object:
            work = begin(self, *given)
            if work is not None:
                self._await(work)
            return begin(self, *given)

        patch.setattr(collectives.AllReduce, "_begin", twice)
        assert {name for name, worst in run(ROW).worst.items() if not worst.ok} == {"Y"}
    with monkeypatch.context() as patch:  # each rank gets its neighbour's rows
        patch.setattr(collectives.ReduceScatter, "start", lambda self, x: scatter(self, x.roll(1, self._dim)))
        assert {name for name, worst in run(sequence).worst.items() if not worst.ok} == {"Y"}
        assert {name for name, worst in run(column).worst.items() if not worst.ok} == {"dX"}
    with monkeypatch.context() as patch:  # gathered in the wrong order
        patch.setattr(collectives.AllGather, "wait", lambda self, sent: gathered(self, sent).flip(self._dim))
        assert not run(column).ok
    with monkeypatch.context() as patch:  # the bias of one rank left out
        if torch.distributed.get_rank() == 0:
            patch.setattr(program, "forward", lambda *given: without(AddBias, lower.forward(*given)))
        wrong = run(ROW).worst["Y"]
        assert not wrong.ok
        assert wrong.rank == 0
    with monkeypatch.context() as patch:  # one element of one rank's db
        function = Namespace.function

        def last(self: Namespace, printed: Printed, title: str) -> Callable[..., Any]:
            made = function(self, printed, title)
            if printed.name == "forward" or torch.distributed.get_rank() != world_size - 1:
                return made

            def wrong(*given: Tensor) -> tuple[Tensor, ...]:
                grads = made(*given)
                grads[2][-1] *= 1.5
                return grads

            return wrong

        patch.setattr(Namespace, "function", last)
        wrong = run(column).worst["db"]
        assert (wrong.ok, wrong.rank, wrong.index) == (False, world_size - 1, (6,))
        with pytest.raises(sg.VerificationError, match=rf"! db\[6\] on rank {world_size - 1} is"):
            run(column).require()


@distributed(world_size=[1, 2])
def test_wrong_shapes_dtypes_and_missing_gradients_fail(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    from shardgrad.verification import product

    real = product.matmul
    for change in (lambda y: y[:-1], lambda y: y.double(), lambda y: y * nan):
        monkeypatch.setattr(product, "matmul", lambda *a, **k: change(real(*a, **k)))  # noqa: B023
        monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a: None)
        check = sg.check_product(ROW, SIZES, mesh)
        assert [worst.ratio for worst in check.worst.values()] == [inf] * 4
        assert "there is none" in str(check.worst["dX"])
        with pytest.raises(sg.VerificationError, match="WRONG"):
            check.require()
    with pytest.raises(ValueError, match="dtype and reduce_dtype must be among float64, float32"):
        sg.check_product(ROW, SIZES, mesh, dtype=torch.int32)


def test_a_tensor_of_ones_own() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = "X[b,s,d] W[m,d] -> Y[b,s,m] + B[m]"
    x, w, b, dy = (torch.randn(s, generator=generator) for s in ((2, 3, 40), (5, 40), (5,), (2, 3, 5)))
    for t in (x, w, b):
        t.requires_grad_()
    y = torch.nn.functional.linear(x, w, b)
    y.backward(dy)
    assert sg.within_bound(y, x, w, layout, bias=b).ok
    assert not sg.within_bound(y, x, w, layout).ok  # a bias that nobody expects
    for made, grad, left, right in (("dX", x.grad, dy, w), ("dW", w.grad, dy, x), ("db", b.grad, dy, None)):
        assert grad is not None
        assert sg.within_bound(grad, left, right, layout, made).ok
        assert sg.within_bound(grad * 1.0001, left, right, layout, made).ratio > 1
        spoilt = grad.clone()
        spoilt.view(-1)[3] = nan
        worst = sg.within_bound(spoilt, left, right, layout, made)
        assert worst.ratio == inf
        assert spoilt[worst.index].isnan()
        assert "instead of" in sg.within_bound(grad[:1], left, right, layout, made).problem
        assert "torch.float64" in sg.within_bound(grad.double(), left, right, layout, made).problem
    with pytest.raises(ValueError, match="made is one of Y, dX, dW, db, not 'dZ'"):
        sg.within_bound(y, x, w, layout, "dZ")
    with pytest.raises(ValueError, match="dX is made of two operands, Y and W"):
        sg.within_bound(y, dy, None, layout, "dX")
    with pytest.raises(sg.ShapeError, match="letter 'd' is 40 in one tensor and 39 in W"):
        sg.within_bound(y, x, w[:, 1:], layout)
    with pytest.raises(sg.ShapeError, match="operands must be of one dtype"):
        sg.within_bound(y, x, w.double(), layout)
    with pytest.raises(sg.ShapeError, match="has 2 dims"):
        sg.within_bound(y, x, w[0], layout)


def test_overflow_is_called_overflow_and_underflow_is_allowed() -> None:
    layout = "X[n,d] W[d,m] -> Y[n,m]"
    x, w = torch.full((2, 300), 100.0, dtype=torch.float16), torch.full((300, 1), 100.0, dtype=torch.float16)
    worst = sg.within_bound(x @ w, x, w, layout)
    assert (worst.ok, worst.overflow) == (False, 2)
    assert "overflow; scale the operands" in str(worst)
    small = torch.full((2, 3), 2.0**-14, dtype=torch.float16)
    assert sg.within_bound(small @ small.T[:, :1], small, small.T[:, :1], layout).ok  # 3 · 2^-28 is zero in fp16
    assert sg.within_bound(torch.full((2, 1), 2.0**-23, dtype=torch.float16), small, small.T[:, :1], layout).ratio > 1
    inside = x / 8
    spoilt = inside @ w
    spoilt[1] = inf
    assert sg.within_bound(spoilt, inside, w / 8, layout).overflow == 0  # 300 · 12.5² is far from 65504: a bug


def test_the_oracle_is_right_to_twice_float64() -> None:
    """Against exact fractions, where float64 itself has lost every digit."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 40, generator=generator, dtype=torch.float64) * 2.0 ** torch.arange(40)
    w = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    w[:, -1] = -(torch.einsum("bnk,bkm->bnm", x[..., :-1], w[:, :-1])[:, 0] / x[:, 0, -1:])  # cancels
    found = oracle.contract(x, w, (("b", "n", "k"), ("b", "k", "m"), ("n", "b", "m")), 40)
    for n in range(2):
        for b in range(2):
            for m in range(3):
                exact = sum(Fraction(float(x[b, n, k])) * Fraction(float(w[b, k, m])) for k in range(40))
                assert abs(Fraction(float(found.value[n, b, m])) - exact) <= Fraction(float(found.error[n, b, m]))
    plain = torch.einsum("bnk,bkm->nbm", x, w)
    assert bool(((plain - found.value).abs() > 1000 * found.error).any())  # float64 alone would not do


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [3, 50, 3000])
def test_exact_operands_are_exact_and_not_empty(dtype: torch.dtype, k: int) -> None:
    layout = sg.Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m] + B[m]")
    x, w, b, dy = operands(layout, {"n": 6, "d": k, "m": 5}, dtype, True, 0)
    for t in (x, w, b, dy):
        assert t.dtype == dtype
        assert torch.equal(t, t.round())
        assert bool(t.any())
    magnitude = x.double().abs() @ w.double().abs() + b.double().abs()
    assert float(magnitude.max()) <= 2.0 ** DIGITS[dtype]
    y = x @ w + b
    worst = sg.within_bound(y, x, w, layout, "Y", {"tp": 3}, bias=b, exact=True)
    assert (worst.ratio, worst.bound) == (0, 0)
    y[2, 3] += 1
    worst = sg.within_bound(y, x, w, layout, "Y", {"tp": 3}, bias=b, exact=True)
    assert (worst.ratio, worst.index) == (inf, (2, 3))


def test_what_is_counted() -> None:
    layout = sg.PRESETS["3d"]  # X[n/a,d/b/c] W[d/b/a,m/c] -> Y[n/a/b,m/c]
    sizes, shape = {"n": 9, "d": 10, "m": 7}, {"a": 2, "b": 3, "c": 4}
    y = computed(layout, "Y", sizes, shape)
    assert (y.terms, y.all_terms, y.reduced, y.left) == (4, 10, (2,), ())
    assert y.blocks == {"d": [(0, 4), (4, 4), (8, 2)]}
    assert computed(layout, "dX", sizes, shape).reduced == (3,)
    assert computed(layout, "dW", sizes, shape).terms == 5
    db = computed(layout, "db", sizes, shape)
    assert (db.terms, sorted(db.reduced)) == (5, [1, 2])  # at most: gathered over b, or reduced over b
    left = computed(sg.Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp}"), "Y", sizes, {"tp": 5})
    assert (left.reduced, left.left) == ((), (4,))


def test_more_ranks_and_narrower_dtypes_have_larger_bounds() -> None:
    x, w = torch.ones(1, 64), torch.ones(64, 1)
    by_dtype = [float(bounded(x.to(d), w.to(d), ROW, "Y", {"tp": 4}).bound) for d in DTYPES]
    assert by_dtype == sorted(by_dtype)
    half = x.bfloat16(), w.bfloat16()
    narrow = float(bounded(*half, ROW, "Y", {"tp": 4}).bound)
    wide = float(bounded(*half, ROW, "Y", {"tp": 4}, reduce_dtype=torch.float32).bound)
    assert narrow / 64 == pytest.approx((1 + 2**-8) ** 4 - 1, rel=0.01)  # a rounding of the partial, three additions
    assert wide / 64 == pytest.approx((1 + 2**-8) ** 2 - 1, rel=0.01)  # the partial, and the result
    alone = float(bounded(*half, ROW, "Y").bound)
    assert alone / 64 == pytest.approx(2**-8, rel=0.01)
    assert float(bounded(x, w, ROW, "Y", {"tp": 4}, lam=6.0).bound) == float(bounded(x, w, ROW, "Y", {"tp": 4}).bound)
    x, w = torch.ones(1, 4096), torch.ones(4096, 1)
    likely = float(bounded(x, w, ROW, "Y", lam=6.0).bound)
    assert likely < 0.1 * float(bounded(x, w, ROW, "Y").bound)


def test_lower_precision_that_the_user_asks_for_is_in_the_bound() -> None:
    assert local(torch.float32).operand == 0
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert local(torch.float32, "cpu").operand == 2.0**-8
        assert local(torch.float32, "cuda").operand == 2.0**-11
        assert local(torch.float64, "cuda").operand == 0
    finally:
        torch.set_float32_matmul_precision(before)
    assert local(torch.float32, "cuda").accumulate == 2.0**-24
    assert local(torch.bfloat16, "cuda").spilled == 16
    assert local(torch.bfloat16, "cpu").spilled == 0
