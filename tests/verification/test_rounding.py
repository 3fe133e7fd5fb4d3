"""Sums in other orders are the same sums; the bounds are what they say; parts and wholes fit together."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.comm.mesh import MeshView
from shardgrad.verification.compare import measure, rows_of
from shardgrad.verification.observed import Observed, Split
from shardgrad.verification.pairing import fit, same_but_joined
from shardgrad.verification.report import Verdict
from shardgrad.verification.rounding import FALSE_ALARM, SLACK, Bounds, Reordered, Spread, floor


def step(dtype: torch.dtype) -> list[Tensor]:
    """A step through every operation whose sums are reordered: its loss and gradients."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    table, gain, shift, w, b, a, v = leaf(9, 6), leaf(6), leaf(6), leaf(7, 6), leaf(7), leaf(2, 7, 4), leaf(4)
    ids = torch.randint(0, 9, (2, 5), generator=generator)
    x = F.layer_norm(F.embedding(ids, table), (6,), gain, shift)
    y = torch.baddbmm(torch.ones(2, 5, 4, dtype=dtype), F.linear(x, w, b), a, beta=0.5, alpha=2) @ v
    z = torch.addmv(y[0].detach(), F.linear(x[0], w, b).t()[:5], x[0, :, 0])
    loss = (y * y.detach().roll(1)).sum() + y.sum(1).square().sum() + z.sum()
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in (table, gain, shift, w, b, a, v))]


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_sums_in_other_orders_are_the_same_sums(blocks: int) -> None:
    exact = step(torch.float64)
    single = step(torch.float32)
    seen = []
    for seed in range(3):
        with Reordered(blocks, seed):
            again, rough = step(torch.float64), step(torch.float32)
        for here, there in zip(again, exact):
            torch.testing.assert_close(here, there, rtol=1e-11, atol=1e-11)
        for here, there in zip(rough, single):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
        seen.append([not torch.equal(here, there) for here, there in zip(rough, single)])
    assert all(map(any, zip(*seen))), "each of the gradients is rounded otherwise in some order"


def test_bounds_hold_for_gaussian_errors_and_are_not_idle() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 4, 1000):
        bounds = Bounds.of(count, count)
        errors = torch.randn(2000, count, generator=generator)
        assert float(errors.norm(dim=1).max()) / math.sqrt(count) < bounds.norm / SLACK
        assert float(errors.abs().max()) < bounds.element / SLACK
    assert Bounds.of(1, 1).norm == pytest.approx(SLACK * (1 + math.sqrt(2 * math.log(1 / FALSE_ALARM))))
    assert Bounds.of(1e6, 1).norm < 1.01 * SLACK
    assert Bounds.of(0.1, 1).norm == Bounds.of(1, 1).norm
    assert Bounds.of(1, 10**6).element == pytest.approx(SLACK * math.sqrt(2 * math.log(2e6 / FALSE_ALARM)))


def test_freedom_tells_errors_of_their_own_from_a_common_one() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.zeros(500, dtype=torch.float64)
    own, common = Spread(exact), Spread(exact)
    for _ in range(9):
        own.add(torch.randn(500, generator=generator))
        common.add(torch.randn((), generator=generator) * torch.ones(500))
    assert own.freedom > 30
    assert common.freedom < 3
    assert Spread(exact).freedom == 1


def test_the_size_of_an_elements_error() -> None:
    exact = torch.zeros(4, 5, dtype=torch.float64)
    spread = Spread(exact)
    rows = torch.tensor([[1.0], [10.0], [0.0], [1.0]])
    for sign in (1.0, -1.0):
        spread.add(sign * rows.expand(4, 5))
    least = torch.full_like(exact, 0.25)
    found = spread.sizes(least)[1]
    rms = math.sqrt((1 + 100 + 1) / 4)
    assert found[:, 0].tolist() == pytest.approx([1.0, 10.0, rms / 8, 1.0])
    assert Spread(exact).sizes(least)[1].tolist() == least.tolist()
    lucky = Spread(torch.zeros(3, 3, dtype=torch.float64))  # one element whose errors were all small by chance
    error = torch.ones(3, 3)
    error[1, 1] = 0
    lucky.add(error)
    assert float(lucky.sizes(torch.zeros(3, 3, dtype=torch.float64))[1][1, 1]) > 0.6


def test_floor() -> None:
    exact = torch.tensor([0.0, -2.0, math.inf], dtype=torch.float64)
    assert floor(exact, torch.bfloat16, 4)[1] == pytest.approx(2 * 2**-8 * 2)
    assert 0 < floor(exact, torch.float32, 1)[0] < 1e-37


def test_many_small_errors_are_seen_in_the_norm_and_one_large_one_in_its_element() -> None:
    generator = torch.Generator().manual_seed(0)
    alone = MeshView({}, torch.device("cpu"), {}, {})
    exact = torch.zeros(100, 100, dtype=torch.float64)

    def verdict(error: Tensor) -> Verdict:
        spread = Spread(exact)
        for _ in range(9):
            spread.add(torch.randn(100, 100, generator=generator))
        found = measure(("gradient", "w"), Split.of([(), ()]), (100, 100), error, spread, 0, alone)
        (row,) = rows_of([found], alone)
        if error[17, 4] == 40:
            assert row.index == (17, 4)
        return row.verdict

    error = torch.randn(100, 100, generator=generator)
    assert verdict(error) == "rounding"
    assert verdict(3 * error) == "rounding"
    assert verdict(6 * error) == "bug", "no element is farther than 30 times"
    assert float(6 * error.abs().max()) < 30
    error[17, 4] = 40.0
    assert verdict(error) == "bug", "the norm hardly changes"


def test_a_split_in_interleaved_parts() -> None:
    """Megatron's partition_stride: of a fused gate and up, each rank has a piece of either."""
    full = torch.arange(12.0).view(12, 1).expand(12, 3)
    split = Split.of([("tp",), ()], stride=2)
    parts = [split.shard(full, {"tp": 3}, {"tp": rank})[:, 0].tolist() for rank in range(3)]
    assert parts == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    with pytest.raises(ValueError, match="do not divide 11"):
        split.indices((11, 3), {"tp": 3}, {"tp": 0})


def test_observed_says_what_a_rank_should_hold() -> None:
    exact = torch.arange(10.0, dtype=torch.float64).view(5, 2)
    observed = Observed(
        "w", "gradient", (exact[:3], exact[3:]), exact, Split.of([("tp",), ()]), {"tp": 2}, ({"tp": 0}, {"tp": 1}),
        torch.full_like(exact, 0.1),
    )  # fmt: skip
    assert torch.equal(observed.expected(1), exact[3:])
    assert observed.agrees(1, exact[3:].float() + 0.29, 3)
    assert not observed.agrees(1, exact[3:].float() + 0.31, 3)
    assert not observed.agrees(1, exact[3:] * math.nan, 3)
    assert not observed.agrees(1, exact[:3], 1e9), "another shape"


def test_shapes_that_are_the_same_but_joined() -> None:
    assert same_but_joined((3, 4, 12), (12, 12))
    assert same_but_joined((12,), (3, 4))
    assert not same_but_joined((4, 3), (3, 4))
    assert not same_but_joined((3, 4), (13,))
    assert fit(torch.ones(2, 3), (4, 3)).sum() == 6
    assert fit(torch.arange(6.0).view(2, 3), (6,)).tolist() == [0, 1, 2, 3, 4, 5]
    assert fit(torch.arange(6.0).view(3, 2), (2, 2)).tolist() == [[0, 1], [2, 3]]
