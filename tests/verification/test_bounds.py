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
from planted import BUGS, Case, applies, worst
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.comm import collectives
from shardgrad.layout import lower, program
from shardgrad.layout.printer import Printed
from shardgrad.layout.schedule import AddBias, Instruction, Instructions
from shardgrad.ops.namespace import Namespace
from shardgrad.testing import distributed
from shardgrad.verification import intervals, oracle
from shardgrad.verification.arithmetic import DIGITS, computed, local
from shardgrad.verification.bounds import bounded, compare
from shardgrad.verification.product import operands

ROW = "X[n,d/tp] W[d/tp,m] -> Y[n,m] + B[m]"
SIZES = {"n": 5, "d": 23, "m": 7}
DTYPES = list(DIGITS)


@distributed(world_size=[1, 2, 3, 4], timeout=120)
def test_right_code_stays_within_its_bounds(world_size: int) -> None:
    """Random legal layouts, grids, dtypes, reduction dtypes, uneven and empty shards; many.py runs thousands."""
    rng = random.Random(world_size)
    for _ in range(40):
        assert not case(rng, world_size).require().suspicious


@pytest.mark.parametrize("k", [16, 256])
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_leave_their_bounds(bug: str, k: int) -> None:
    """Smallest ratios measured are in docs/bounds.md."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if not applies(bug, dtype):
            continue
        for seed in range(5):
            one = Case(k, dtype, seed)
            right = worst(one, one.right())
            assert max(right.ratio, right.likely) <= 1
            assert worst(one, BUGS[bug](one)).ratio > 1.5, (dtype, seed)


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
    (y,) = computed(layout, "Y", sizes, shape)
    assert (y.reduced, y.left) == ((2,), ())
    assert y.blocks == {"d": [(0, 4), (4, 4), (8, 2)]}
    assert computed(layout, "dX", sizes, shape)[0].reduced == (3,)
    assert computed(layout, "dW", sizes, shape)[0].blocks == {"n": [(0, 5), (5, 4)]}
    stored, gathered = computed(layout, "db", sizes, shape)  # over b, dY may have been gathered for a product
    assert (sorted(stored.reduced), len(stored.blocks["n"])) == ([1, 2], 6)
    assert (gathered.reduced, len(gathered.blocks["n"])) == ((1,), 2)
    (left,) = computed(sg.Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp}"), "Y", sizes, {"tp": 5})
    assert (left.reduced, left.left) == ((), (4,))


def orders(numbers: list[float], dtype: torch.dtype, last: bool = True) -> set[float]:
    """All sums of numbers in all orders, each but the last rounded to `dtype`, or to float32."""
    if len(numbers) == 1:
        return {numbers[0]}
    found: set[float] = set()
    first, *rest = numbers
    for chosen in range(2 ** len(rest) - 1):
        one = [first, *(x for at, x in enumerate(rest) if chosen >> at & 1)]
        other = [x for at, x in enumerate(rest) if not chosen >> at & 1]
        for a in orders(one, dtype, False):
            for b in orders(other, dtype, False):
                total = torch.tensor(a + b, dtype=torch.float64)
                found |= {float(total)} if last else {float(total.float()), float(total.float().to(dtype))}
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [torch.float64, torch.float32])
def test_the_sums_of_all_orders_and_no_others(dtype: torch.dtype, held: torch.dtype) -> None:
    numbers = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype).double()
    ends = [torch.stack((row, -row))[None].to(held) for row in numbers.T]
    sums = intervals.added(ends, (dtype, torch.float32)).double()
    for at, row in enumerate(numbers.tolist()):
        reached = {float(torch.tensor(x, dtype=held)) for x in orders(row, dtype)}
        assert (float(sums[0, 0, at]), -float(sums[0, 1, at])) == (min(reached), max(reached))
    assert (sums[0, 0] < -sums[0, 1]).sum() >= 4  # the order matters


def test_sums_of_many_numbers() -> None:
    """Of more than six, a bound that the orders reach in good part, and do not leave."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(300, 8, generator=generator).bfloat16()
    ends = [torch.stack((row, -row))[None] for row in numbers.double().T]
    sums = intervals.added(ends, (torch.bfloat16, torch.float32))
    exact, width = numbers.double().sum(1), (-sums[0, 1] - sums[0, 0]) / 2
    most = torch.zeros(300, dtype=torch.float64)
    for _ in range(50):
        order = numbers[:, torch.randperm(8, generator=generator)].unbind(1)
        inner = order[0]
        for number in order[1:-1]:
            inner = inner + number
        total = inner.double() + order[-1].double()
        assert bool((total >= sums[0, 0]).all())
        assert bool((total <= -sums[0, 1]).all())
        most = torch.maximum(most, (total - exact).abs() / width)
    assert 0.3 < float(most.max()) <= 1


@pytest.mark.parametrize("cancels", [False, True])
def test_a_sum_that_goes_as_wrong_as_it_can_is_within_its_bound_and_suspicious(cancels: bool) -> None:
    """1 and a little more than half of its spacing, again and again: each addition is rounded up, by almost u."""
    terms = [1.0, *[2.0**-24 * (1 + 2.0**-10)] * 600, *[-1.0] * cancels]
    total = torch.zeros(())
    for term in terms:
        total = total + torch.tensor(term)
    x, w = torch.tensor([terms]), torch.ones(len(terms), 1)
    worst = sg.within_bound(total.view(1, 1), x, w, "X[n,d] W[d,m] -> Y[n,m]")
    assert 0.98 < worst.ratio <= 1
    assert worst.suspicious
    assert worst.likely > 3
    assert "SUSPICIOUS, roundings with mean zero do that in less than 1e-06 of all tensors (λ = 5.4)" in str(worst)
    assert sg.within_bound(x @ w, x, w, "X[n,d] W[d,m] -> Y[n,m]").ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_ulp_is_seen_where_one_number_alone_is_right(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.randn(s, generator=generator).to(dtype) for s in ((16, 64), (64, 16)))
    layout = "X[n,d/tp] W[d/tp,m] -> Y[n,m]"
    right = bounded(x, w, layout)
    assert right.power().ulp > 0.9
    assert right.power().median < 0.6
    y = x @ w
    seen = 0
    for at in range(256):
        wrong = y.clone()
        wrong.view(torch.int16).view(-1)[at] += 1
        found = compare("Y", wrong, right, dtype)
        seen += not found.ok
        assert found.ok or found.index == (at // 16, at % 16)
    assert abs(seen / 256 - right.power().ulp) < 0.06
    # Of two ranks' partial sums, rounded and added, there is one alone too; where they may be rounded or not, are two.
    halves = [(a @ b) for a, b in zip(x.chunk(2, 1), w.chunk(2, 0))]
    both = bounded(x, w, layout, "Y", {"tp": 2}, all_rounded=True)
    assert compare("Y", halves[0] + halves[1], both, dtype).ok
    assert both.power().ulp > 0.85
    assert not compare("Y", y, both, dtype).ok
    assert sg.within_bound(y, x, w, layout, "Y", {"tp": 2}).ok
    assert sg.within_bound(halves[0] + halves[1], x, w, layout, "Y", {"tp": 2}).ok
    thirds = [(a @ b) for a, b in zip(x.chunk(3, 1), w.chunk(3, 0))]
    three = bounded(x, w, layout, "Y", {"tp": 3}, all_rounded=True)
    assert compare("Y", thirds[0] + thirds[1] + thirds[2], three, dtype).ok
    assert compare("Y", torch.stack(thirds).float().sum(0).to(dtype), three, dtype).ok  # as shared memory adds
    wide = bounded(x, w, layout, "Y", {"tp": 2}, reduce_dtype=torch.float32, all_rounded=True)
    assert compare("Y", (halves[0].float() + halves[1].float()).to(dtype), wide, dtype).ok
    left = bounded(x, w, f"{layout}{{tp}}", "Y", {"tp": 2}, all_rounded=True)  # the sum is not rounded
    assert compare("Y", halves[0].double() + halves[1].double(), left, torch.float64).ok
    assert torch.equal(wide.lower, both.lower)  # one addition, rounded to 16 bits at once or after float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_two_numbers_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x, w = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((9, 1), (1, 9)))
    right = bounded(x, w, "X[n,d] W[d,m] -> Y[n,m]")
    assert compare("Y", x @ w, right, dtype).ok
    ulps = (right.upper - right.lower)[0] / right.exact.abs() * 2.0 ** (DIGITS[dtype] - 1)
    assert float(ulps.max()) <= (3 if dtype == torch.float64 else 0)  # float64's oracle is rounded too


def test_sums_that_the_accumulator_holds_are_not_rounded() -> None:
    """257 lies between 256 and 258 in bf16: to even, and nothing else."""
    x, w = torch.tensor([[256.0, 0.5, 0.5]]).bfloat16(), torch.ones(3, 1).bfloat16()
    layout = "X[n,d] W[d,m] -> Y[n,m]"
    assert [float(end) for end in (bounded(x, w, layout).lower[0], bounded(x, w, layout).upper[0])] == [256, 256]
    assert not sg.within_bound(torch.full((1, 1), 258.0).bfloat16(), x, w, layout).ok
    dy = torch.tensor([256.0, 1.0, 0.0, 2.0**-30]).bfloat16()[:, None]  # which float32 does not hold
    assert float(bounded(dy, None, "X[n,d] W[d,m] -> Y[n,m] + B[m]", "db").upper[0]) == 258
    assert float(bounded(dy[:3], None, "X[n,d] W[d,m] -> Y[n,m] + B[m]", "db").upper[0]) == 256


@distributed(world_size=[2, 3])
def test_the_power_is_told_and_a_single_ulp_is_seen(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardgrad.verification import product

    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    check = sg.check_product(ROW, SIZES, mesh, dtype=torch.bfloat16)
    assert check.require().power["Y"].ulp > 0.6
    assert check.power["dX"].ulp > 0.95
    assert not check.suspicious
    assert f"sees one ulp in {check.power['Y'].ulp:.0%} of the elements" in str(check)
    real, seen = product.matmul, 0
    for at in range(5):

        def off(*given: Any, at: int = at, **named: Any) -> Tensor:
            y = real(*given, **named)
            if torch.distributed.get_rank() == world_size - 1:
                y.detach().view(torch.int16)[at, 2] += 1
            return y

        monkeypatch.setattr(product, "matmul", off)
        found = sg.check_product(ROW, SIZES, mesh, dtype=torch.bfloat16).worst["Y"]
        if not found.ok:
            seen += 1
            assert (found.rank, found.index) == (world_size - 1, (at, 2))
            assert "roundings reach" in str(found)
    assert seen >= 2


def test_more_ranks_and_narrower_dtypes_have_larger_bounds() -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((8, 64), (64, 8)))

    def width(dtype: torch.dtype, ranks: int = 4, wire: torch.dtype | None = None) -> float:
        given = x.to(dtype), w.to(dtype)
        right = bounded(*given, ROW, "Y", {"tp": ranks}, reduce_dtype=wire, all_rounded=True)
        return float((right.upper - right.lower)[0].mean())

    by_dtype = [width(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert by_dtype == sorted(by_dtype)
    by_ranks = [width(torch.bfloat16, ranks) for ranks in (2, 3, 4, 8)]
    assert by_ranks == sorted(by_ranks)
    assert width(torch.bfloat16, 4, torch.float32) < 0.2 * width(torch.bfloat16)


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
    products = [local(dtype).product for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert products == [2.0**-53, 2.0**-24, 0, 0]
