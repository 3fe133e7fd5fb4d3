"""Whether two tensors are the same bits, and how far apart where they are not."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor

from shardgrad.comm.mesh import MeshView
from shardgrad.verification.exchange import from_first

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Apart:
    """elements: how many differ. ulps: as of `WrongShard`. first: the place of the first of them, rows first."""

    elements: int
    ulps: float
    first: int


def raw(x: Tensor) -> Tensor:
    """The bytes of a tensor, in row-major order."""
    return x.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def apart(one: Tensor, other: Tensor) -> Apart | None:
    """How two tensors of one shape and dtype differ; None where every bit is the same. NaNs are bits like any other."""
    if torch.equal(raw(one), raw(other)):
        return None
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    one, other = one.detach().contiguous().view(-1), other.detach().contiguous().view(-1)
    whole = _INTEGERS[one.element_size()]
    places = (one.view(whole) != other.view(whole)).nonzero().view(-1)
    return Apart(len(places), _ulps(one[places], other[places]), int(places[0]))


def _ulps(one: Tensor, other: Tensor) -> float:
    """How many numbers lie between, at most. Of integers, their difference."""
    if one.is_floating_point():
        if any(bool(x.double().isnan().any()) for x in (one, other)):
            return inf
        one, other = _ordered(one), _ordered(other)
    one, other = one.to(torch.int64), other.to(torch.int64)
    far = (one.double() - other.double()).abs()
    near = (one - other).abs().double()  # wraps around where far is large, and has every digit where it is not
    return float(torch.where(far < 2.0**53, near, far).max())


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of the numbers, one apart for neighbours; of 0 and -0 the same."""
    bits = x.view(_INTEGERS[x.element_size()])
    if bits.dtype == torch.uint8:
        bits = bits.view(torch.int8)
    bits = bits.to(torch.int64)
    smallest = -(2 ** (8 * x.element_size() - 1))
    return torch.where(bits < 0, smallest - bits, bits)


def bits_of_first(x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, mesh: MeshView) -> Tensor:
    """The first rank's tensor on every rank, bit for bit: moved as integers, for a sum makes 0 of -0.

    x: on the first rank.
    """
    size = prod(shape) * dtype.itemsize
    words = torch.zeros(-(-size // 4), dtype=torch.int32, device=mesh.device)
    if x is not None:
        words.view(torch.uint8)[:size] = raw(x).to(mesh.device)
    return from_first(words, mesh).view(torch.uint8)[:size].clone().view(dtype).view(shape)
