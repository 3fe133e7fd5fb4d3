"""Initial values: every block is the block of the same global tensor, and the numbers are what they claim to be."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from shardgrad.nn import init
from shardgrad.nn.counter import bits32, bits64


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


@pytest.mark.parametrize("bits", [bits32, bits64])
def test_short_runs_and_long_ones_are_cut_from_the_same_stream(bits) -> None:  # type: ignore[no-untyped-def]
    kind = bits(0, [1], [0], [1]).dtype
    per = 8 // kind.itemsize
    for shape, starts, lengths in (
        ((50, 7, 9), (3, 2, 4), (40, 5, 3)),  # short: whole rows are made, and cut
        ((3, 7001, 2), (1, 3001, 1), (2, 4000, 1)),  # long: entered row by row
        ((3, 20011), (0, 9999), (3, 10012)),
        ((), (), ()),
        ((5, 0, 2), (1, 0, 0), (2, 0, 2)),
    ):
        count = int(np.prod(shape))
        stream = np.random.Philox(key=12 | 5 << 64).random_raw(-(-count // per))
        full = np.asarray(stream, np.uint64).view(kind)[:count].reshape(shape)
        block = bits(12 | 5 << 64, shape, starts, lengths)
        np.testing.assert_array_equal(block, full[tuple(slice(s, s + n) for s, n in zip(starts, lengths))])


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
