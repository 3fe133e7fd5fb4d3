"""Initial values: every block is the block of the same global tensor, and the numbers are what they claim to be."""

from __future__ import annotations

import random

import pytest
import torch

from shardgrad.nn import init


@pytest.mark.parametrize("make", [init.uniform, init.normal])
def test_any_block_is_cut_from_one_global_tensor(make) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(1)
    for _ in range(200):
        shape = [rng.randint(1, 7) for _ in range(rng.randint(0, 4))]
        starts = [rng.randint(0, size) for size in shape]
        lengths = [rng.randint(0, size - start) for size, start in zip(shape, starts)]
        full = make(1.5, 77, shape, [0] * len(shape), shape)
        block = make(1.5, 77, shape, starts, lengths)
        assert list(block.shape) == lengths
        for dim, (start, length) in enumerate(zip(starts, lengths)):
            full = full.narrow(dim, start, length)
        assert torch.equal(block, full)


def test_moments_and_streams() -> None:
    count = 200_000
    x = init.normal(2.0, 5, [count], [0], [count])
    # within 5 standard errors of mean 0, variance 4, fourth moment 3 * 16
    assert abs(float(x.mean())) < 5 * 2 / count**0.5
    assert abs(float(x.var()) - 4) < 5 * 4 * (2 / count) ** 0.5
    assert abs(float((x**4).mean()) - 48) < 5 * (96 * 256 / count) ** 0.5
    u = init.uniform(0.5, 5, [count], [0], [count])
    assert float(u.min()) >= -0.5
    assert float(u.max()) < 0.5
    assert abs(float(u.mean())) < 5 * (1 / 12 / count) ** 0.5
    other = init.normal(2.0, 6, [count], [0], [count])
    assert abs(float((x * other).mean())) < 5 * 4 / count**0.5
    assert abs(float((x[1:] * x[:-1]).mean())) < 5 * 4 / count**0.5


def test_the_seed_comes_from_torchs_generator_one_draw_each() -> None:
    torch.manual_seed(0)
    first, second = init.draw_seed(), init.draw_seed()
    torch.manual_seed(0)
    assert (init.draw_seed(), init.draw_seed()) == (first, second)
    assert first != second
    own = torch.Generator().manual_seed(3)
    assert init.draw_seed(own) == init.draw_seed(torch.Generator().manual_seed(3))
