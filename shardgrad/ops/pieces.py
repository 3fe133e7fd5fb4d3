"""What lies between products in exact mode: functions of single pieces, so that their calls do not depend on the ranks.

A kernel rounds the last elements of a call otherwise than the rest, where it does those one by one and not in vectors:
silu, gelu, sigmoid, softplus, pow. So which elements these are must not depend on how many a rank has.
"""

from __future__ import annotations

import re
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

GRAIN = 32
"""A call of a multiple of so many elements has no last ones that are done one by one."""

_BLOCK = 1 << 14  # elements that torch gives to one thread, whatever the number of threads
_LANES = 64

_SAFE = re.compile(
    "torch::autograd::AccumulateGrad|"
    "(Abs|Add|Clamp|ClampMax|ClampMin|Cos|Div|Erf|Exp|Log|MaskedFill|Maximum|Minimum|Mul|Neg|Relu|Rsub|Sin|Sqrt|Sub|Tanh|"
    "Where|Alias|Cat|Clone|Expand|Narrow|Permute|Repeat|Reshape|ReshapeAlias|Select|Slice|Split|SplitWithSizes|Squeeze|"
    "Stack|T|ToCopy|Transpose|Unbind|UnsafeSplit|UnsafeView|Unsqueeze|View)Backward[0-9]?"
)
"""Functions whose elements do not depend on how many there are, and those that only move."""

_STRIDED = re.compile(
    "(Expand|Narrow|Permute|Select|Slice|Split|SplitWithSizes|T|Transpose|Unbind|UnsafeSplit)Backward"
)
"""Of these, those whose result is part of something else in memory."""


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
        flat = [_Padded.apply(tensor, -size % _LANES) for tensor in tensors]
        blocks = zip(*(one.split(_BLOCK) for one in flat)) if torch.get_num_threads() > 1 else [flat]
        made = [function(*block) for block in blocks]
        whole: Tensor = _Unpadded.apply(made[0] if len(made) == 1 else torch.cat(made), shape)
        return whole

    return apply


class _Padded(FirstDerivativeOnly):
    """One dim, of ones behind what there is."""

    what = "per_piece"

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: int) -> Tensor:
        ctx.shape = x.shape
        return F.pad(x.reshape(-1), (0, more), value=1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[: ctx.shape.numel()].view(ctx.shape), None


class _Unpadded(FirstDerivativeOnly):
    what = "per_piece"

    @staticmethod
    def forward(ctx: Any, flat: Tensor, shape: torch.Size) -> Tensor:
        ctx.size = flat.numel()
        return flat[: shape.numel()].clone().view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return F.pad(grad.reshape(-1), (0, ctx.size - grad.numel())), None


def check_origin(x: Tensor, pieces: int) -> None:
    """Refuse a tensor that comes, since the last layer, from a function whose bits depend on how many elements it has.

    Seen where a graph is recorded. Where pieces are whole vectors, and one thread does all of them, it does not matter.

    Raises:
        LayoutError: it does.
    """
    one_by_one = (x.numel() // pieces) % GRAIN if pieces else 0
    chunked = torch.get_num_threads() > 1 and x.numel() > _BLOCK
    seen, ahead = set[Any](), [x.grad_fn]
    function, strided = "", ""
    while ahead:
        node = ahead.pop()
        if (
            node is None
            or node in seen
            or getattr(getattr(node, "_forward_cls", None), "__module__", "").startswith("shardgrad")
        ):
            continue
        seen.add(node)
        name = node.name()
        if not _SAFE.fullmatch(name):
            function = name
        elif _STRIDED.match(name):
            strided = name
        ahead += [before for before, _ in node.next_functions if before is not None]
    if not function or not (one_by_one or chunked or strided):
        return
    if one_by_one:
        why = f"pieces of {x.numel() // pieces} elements, no multiple of {GRAIN}"
    elif chunked:
        why = f"{torch.get_num_threads()} threads that share {x.numel()} elements"
    else:
        why = f"{strided} before or after it leaves rows that it does one by one"
    raise LayoutError(
        f"exact mode: a tensor of shape {tuple(x.shape)} comes from {function}, whose bits may depend on how many "
        f"elements a rank has ({why}). If it is a function of each element, wrap it: sg.per_piece(function)(x); if it "
        "sums over what is sharded, write it as a product or a layer"
    )
