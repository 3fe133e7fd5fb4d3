"""What lies between products in exact mode: functions of single pieces, so that their calls do not depend on the ranks.

A kernel rounds the last elements of a call otherwise than the rest, where it does those one by one and not in vectors:
silu, gelu, sigmoid, softplus, pow. So which elements these are must not depend on how many a rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product as every
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.arguments import told
from shardgrad.comm.first_derivatives import FirstDerivativeOnly
from shardgrad.errors import LayoutError
from shardgrad.ops.in_pieces import compact, piece

GRAIN = 64
"""A call of a multiple of so many elements has no last ones that are done one by one, in any dtype."""

BLOCK = 1 << 14
"""Elements that torch gives to one thread, whatever the number of threads."""


def cut(x: Tensor, counts: Mapping[int, int]) -> list[Tensor]:
    """The pieces of x, contiguous, the last dim's fastest. counts: pieces along each dim that has several.

    One piece too is a node of the graph, in which the gradients of what is done with it are added before any others.

    Raises:
        LayoutError: a dim is not cut evenly.
    """
    along = _along(counts, x.dim())
    for dim, count in enumerate(along):
        if x.shape[dim] % count:
            raise LayoutError(
                f"exact mode: dim {dim} of {tuple(x.shape)} on this rank is not {count} equal pieces: the pieces "
                "of an axis divide every size that it splits"
            )
    return list(_Cut.apply(x, along))


def join(pieces: Sequence[Tensor], counts: Mapping[int, int]) -> Tensor:
    """The whole of which these are the pieces: the adjoint of `cut`."""
    whole: Tensor = _Join.apply(_along(counts, pieces[0].dim()), *pieces)
    return whole


def _along(counts: Mapping[int, int], dims: int) -> tuple[int, ...]:
    """The pieces along each of so many dims."""
    return tuple([counts.get(dim, 1) * counts.get(dim - dims, 1) for dim in range(dims)])


class _Cut(FirstDerivativeOnly):
    what = "a tensor cut into pieces"

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.counts = counts
        return tuple([compact(one) for one in _pieces(x, counts)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _whole(grads, ctx.counts), None


class _Join(FirstDerivativeOnly):
    what = "a tensor joined from pieces"

    @staticmethod
    def forward(ctx: Any, counts: tuple[int, ...], *pieces: Tensor) -> Tensor:
        ctx.counts = counts
        return _whole(pieces, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(compact(one) for one in _pieces(grad, ctx.counts))


def _places(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return every(*map(range, counts))


def _pieces(x: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    for at in _places(counts):
        yield piece(x, at, counts)


def _whole(pieces: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    if len(pieces) == 1:
        return pieces[0].view_as(pieces[0])
    one = pieces[0]
    whole = one.new_empty([size * count for size, count in zip(one.shape, counts)])
    for part, to in zip(pieces, _pieces(whole, counts), strict=True):
        to.copy_(part)
    return whole


@told
def per_piece(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An elementwise function whose bits do not depend on how many elements a rank has, for use in exact mode.

        act = sg.per_piece(torch.nn.functional.silu)
        h = act(gate) * up

    The function is given one dim of so many elements that none is left over for a kernel's slower, and otherwise
    rounding, end; forward and backward. It costs a copy. Nothing is communicated.

    Args:
        function: of tensors of one shape, each element by itself.
    """

    def apply(*tensors: Tensor) -> Tensor:
        shape = tensors[0].shape
        if any(tensor.shape != shape for tensor in tensors):
            raise LayoutError(
                f"per_piece: tensors of shapes {', '.join(str(tuple(t.shape)) for t in tensors)}; those of an "
                "elementwise function are alike: expand what is broadcast"
            )
        size = shape.numel()
        flat = [Padded.apply(tensor, -size % GRAIN) for tensor in tensors]
        blocks = zip(*(one.split(BLOCK) for one in flat)) if torch.get_num_threads() > 1 else [flat]
        made = [function(*block) for block in blocks]
        whole: Tensor = Unpadded.apply(made[0] if len(made) == 1 else torch.cat(made), shape)
        return whole

    return apply


class Padded(FirstDerivativeOnly):
    """One dim, of ones behind what there is."""

    what = "per_piece"

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: int) -> Tensor:
        ctx.shape = x.shape
        return F.pad(x.reshape(-1), (0, more), value=1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[: ctx.shape.numel()].view(ctx.shape), None


class Unpadded(FirstDerivativeOnly):
    what = "per_piece"

    @staticmethod
    def forward(ctx: Any, flat: Tensor, shape: torch.Size) -> Tensor:
        ctx.size = flat.numel()
        return flat[: shape.numel()].clone().view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return F.pad(grad.reshape(-1), (0, ctx.size - grad.numel())), None
