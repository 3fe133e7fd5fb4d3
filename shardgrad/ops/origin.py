"""What was done to a tensor since the last layer, as the graph says, and whether exact mode can promise its bits.

Measured of what torch has (2.13, one thread, four dtypes): functions of each element by itself make equal bits of parts
whose sizes are multiples of `GRAIN`, some of them of any parts. Of nothing else is it known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.errors import LayoutError
from shardgrad.ops.pieces import BLOCK, GRAIN, Padded, Unpadded

_JOINING = "Cat|Stack"
_SAFE = re.compile(
    "torch::autograd::AccumulateGrad|"
    "(Abs|Add|Clamp|ClampMax|ClampMin|Cos|Div|Erf|Exp|Log|MaskedFill|Maximum|Minimum|Mul|Neg|Relu|Rsub|Sin|Sqrt|Sub|Tanh|"
    f"Where|Alias|{_JOINING}|Clone|Expand|Narrow|Permute|Repeat|Reshape|ReshapeAlias|Select|Slice|Split|SplitWithSizes|"
    "Squeeze|T|ToCopy|Transpose|Unbind|UnsafeSplit|UnsafeView|Unsqueeze|View)Backward[0-9]?"
)
"""Functions whose elements do not depend on how many there are, and those that only move."""

_ELEMENTWISE = re.compile(
    "(Acos|Acosh|Addcdiv|Addcmul|Asin|Asinh|Atan|Atan2|Atanh|Celu|Copysign|Cosh|Deg2Rad|Elu|Erfc|Erfinv|Exp2|Expm1|Floor|"
    "Fmax|Fmin|Fmod|Frac|Gelu|Hardshrink|Hardsigmoid|Hardswish|Hardtanh|Hypot|LeakyRelu|Lerp|Lgamma|Log10|Log1P|Log2|"
    "LogSigmoid|Logaddexp|Logit|Mish|NanToNum|Pow|PreluKernel|Reciprocal|Remainder|Round|Rsqrt|Sigmoid|Sign|Silu|Sinc|"
    "Sinh|Softplus|Softshrink|Tan|Trunc|Xlogy)Backward[0-9]?"
)
"""Functions of each element, of which the last of a call may be rounded otherwise."""

_STRIDED = re.compile(
    "(Expand|Narrow|Permute|Select|Slice|Split|SplitWithSizes|T|Transpose|Unbind|UnsafeSplit)Backward"
)
"""Of the safe ones, those whose result is part of something else in memory."""


def check_origin(x: Tensor, pieces: int) -> None:
    """Refuse a tensor that comes, since the last layer, from a function whose bits depend on how many elements it has.

    Seen where a graph is recorded. For functions of each element it does not matter where pieces are whole vectors, and
    one thread does all of them.

    Raises:
        LayoutError: it does.
    """
    function, strided = "", ""
    for node, wrapped in _since_last_layer(x):
        name = node.name()
        safe, theirs = _SAFE.fullmatch(name), hasattr(node, "_forward_cls")  # an autograd Function of somebody's
        if not safe and not _ELEMENTWISE.fullmatch(name) and not (theirs and wrapped):
            raise LayoutError(
                f"exact mode: a tensor of shape {tuple(x.shape)} comes from {name}, which is not known as a function "
                "of each element by itself: over what is sharded, its bits or all it means depend on how many elements "
                "a rank has. Write it as a product or a layer; or if it is one, wrap it: sg.per_piece(function)(x)"
            )
        if not wrapped and (not safe or shim.multiplied_first(node)):
            function = name
        elif not wrapped and _STRIDED.match(name):
            strided = name
        if not re.match(_JOINING, name) and node.next_functions and shim.broadcasts(node):
            raise LayoutError(
                f"exact mode: a tensor of shape {tuple(x.shape)} comes from {name} of a smaller tensor, whose gradient "
                "sums over what a rank has of the larger one. Write it as a product or a layer, or detach the smaller"
            )
    one_by_one = x.numel() % (pieces * GRAIN)
    chunked = torch.get_num_threads() > 1 and x.numel() > BLOCK
    if not function or not (one_by_one or chunked or strided):
        return
    if one_by_one:
        why = f"{pieces} pieces of {x.numel()} elements, no multiples of {GRAIN}"
    elif chunked:
        why = f"{torch.get_num_threads()} threads that share {x.numel()} elements"
    else:
        why = f"{strided} before or after it leaves rows that it does one by one"
    raise LayoutError(
        f"exact mode: a tensor of shape {tuple(x.shape)} comes from {function}, whose bits may depend on how many "
        f"elements a rank has ({why}): wrap it: sg.per_piece(function)(x)"
    )


def _since_last_layer(x: Tensor) -> Iterator[tuple[Any, bool]]:
    """The nodes of the graph that made x since the last layer, and whether `per_piece` called them."""
    seen, ahead = set[Any](), [(x.grad_fn, False)]
    while ahead:
        node, wrapped = ahead.pop()
        if node is None or (node, wrapped) in seen:
            continue
        seen.add((node, wrapped))
        made_by = getattr(node, "_forward_cls", None)
        if made_by in (Padded, Unpadded):
            wrapped = made_by is Unpadded
        elif getattr(made_by, "__module__", "").startswith("shardgrad"):
            continue
        else:
            yield node, wrapped
        ahead += [(before, wrapped) for before, _ in node.next_functions]
