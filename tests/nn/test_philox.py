"""The bits that a device makes for itself are NumPy's, to the last."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.nn import dropout, philox
from shardgrad.nn.counter import bits32
from shardgrad.nn.init import draw_seed
from shardgrad.testing import distributed

CPU = torch.device("cpu")


def test_the_numbers_are_numpys() -> None:
    """Also where products of halves carry, and where the counter is large."""
    for key in (0, 5, 2**64 - 1, 2**128 - 1, 0x9E3779B97F4A7C15 | 3 << 64):
        for first in (0, 1, 2**31 - 3, 2**32 - 2, 2**60):
            found = philox.numbers(torch.arange(first + 1, first + 6), key).numpy().view(np.uint64)
            stream = np.random.Philox(key=key)
            stream.advance(first)
            assert np.array_equal(found.ravel(), stream.random_raw(20)), (key, first)


@pytest.mark.parametrize("seed", range(3))
def test_any_block_has_the_mask_of_the_host(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        shape = [int(rng.integers(1, 12)) for _ in range(rng.integers(0, 5))]
        starts = [int(rng.integers(0, size)) for size in shape]
        lengths = [
            int(rng.integers(0 if rng.integers(8) == 0 else 1, size - at + 1)) for size, at in zip(shape, starts)
        ]
        key, threshold = int(rng.integers(2**63)) | int(rng.integers(2**63)) << 64, int(rng.integers(2**32))
        found = philox.below(threshold, key, shape, starts, lengths, CPU)
        assert np.array_equal(found.numpy(), bits32(key, shape, starts, lengths) < np.uint32(threshold))


@pytest.mark.parametrize("threshold", [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
def test_thresholds_at_the_ends_of_signed_numbers(threshold: int) -> None:
    bits = bits32(7, (4096,), (0,), (4096,))
    found = philox.below(threshold, 7, (4096,), (0,), (4096,), CPU)
    assert np.array_equal(found.numpy(), bits < np.uint32(threshold))
    at = int(bits[11])  # and at a value that is there
    assert not philox.below(at, 7, (4096,), (11,), (1,), CPU)
    assert philox.below(at + 1, 7, (4096,), (11,), (1,), CPU)


def test_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "_AT_ONCE", 3)
    found = philox.below(2**30, 7, (5, 50), (1, 3), (3, 41), CPU)
    assert np.array_equal(found.numpy(), bits32(7, (5, 50), (1, 3), (3, 41)) < 2**30)


@distributed(world_size=[1, 2, 3])
def test_dropout_is_the_same_either_way(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layer = dropout.Dropout(0.3, "X[b,s/tp,d]", mesh=mesh)
    x = sg.shard(torch.randn(3, 7, 5), layer.spec, mesh)
    found = []
    for make in (dropout._below_by_numpy, philox.below):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dropout, "_below_by_numpy", make)
            torch.manual_seed(3)
            found.append(layer(x, {"s": 7}))
    assert torch.equal(*found)
    assert bool((found[0] == 0).any())
    assert bool((found[0] != 0).any())


def test_keys_are_the_hosts_whatever_the_default_device() -> None:
    torch.manual_seed(3)
    expected = draw_seed()
    torch.manual_seed(3)
    with torch.device("meta"):
        assert draw_seed() == expected
