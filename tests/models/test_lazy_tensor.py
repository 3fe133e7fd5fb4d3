"""Lazy tensors give what torch's functions make of whole ones, whatever slices are asked for."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from shardgrad.models.lazy_tensor import LazyTensor, chunk, concatenate, same_values, stack, transpose


def lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), lambda at: tensor[at])


def assert_reads(found: LazyTensor, expected: Tensor, draw: random.Random) -> None:
    assert found.shape == tuple(expected.shape)
    assert torch.equal(found.read(found.everything()), expected)
    for _ in range(30):
        ends = [sorted(draw.choices(range(size + 1), k=2)) for size in expected.shape]
        at = tuple(slice(start, stop) for start, stop in ends)
        read = found.read(at)
        assert read.shape == expected[at].shape, at
        assert torch.equal(read, expected[at]), at


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_as_torch(dim: int) -> None:
    draw = random.Random(dim)
    made = [torch.randn(3, 4, 5) for _ in range(3)]
    assert_reads(stack([lazy(one) for one in made], dim), torch.stack(made, dim), draw)
    assert_reads(transpose(lazy(made[0]), dim, 1), made[0].transpose(dim, 1), draw)
    sizes = [2, 0, 3]
    uneven = [torch.randn(*(size if at == dim else 4 for at in range(3))) for size in sizes]
    assert_reads(concatenate([lazy(one) for one in uneven], dim), torch.cat(uneven, dim), draw)
    for found, expected in zip(chunk(lazy(made[1]), 2, dim), made[1].chunk(2, dim), strict=True):
        assert_reads(found, expected, draw)
    nested = concatenate([stack([lazy(one) for one in made], 0), stack([lazy(one) for one in made[::-1]], 0)], dim)
    assert_reads(nested, torch.cat([torch.stack(made), torch.stack(made[::-1])], dim), draw)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"the first tensor has shape \(2, 3\), number 1 \(2, 4\)"):
        stack([lazy(torch.ones(2, 3)), lazy(torch.ones(2, 4))], 0)
    with pytest.raises(ValueError, match=r"along dim 0 have shapes \(2, 3\), \(2, 4\)"):
        concatenate([lazy(torch.ones(2, 3)), lazy(torch.ones(2, 4))], 0)


def test_same_values() -> None:
    one = torch.randn(7, 3)
    other = one.clone()
    assert same_values(lazy(one), lazy(other), rows=2)
    assert same_values(lazy(one), lazy(other.double()), rows=2)
    other[6, 2] += 1
    assert not same_values(lazy(one), lazy(other), rows=2)
    assert same_values(lazy(torch.tensor(2.0)), lazy(torch.tensor(2.0)))
