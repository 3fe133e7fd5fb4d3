"""`convolve`: a convolution under the rule of products. Its channels are the letters, its windows stay local."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import grad as transpose

from shardgrad.arguments import told
from shardgrad.comm import shim
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import parse
from shardgrad.layout.sizes import Sizes
from shardgrad.ops.bilinear import Local
from shardgrad.ops.bound import BoundMatmul, bind, run

# By the number of spatial dims: Y of (X, W), and its transposes: dX of (X's shape, W, dY), dW of (X, W's shape, dY).
_TORCH: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    1: (F.conv1d, transpose.conv1d_input, transpose.conv1d_weight),
    2: (F.conv2d, transpose.conv2d_input, transpose.conv2d_weight),
    3: (F.conv3d, transpose.conv3d_input, transpose.conv3d_weight),
}
Numbers = int | Sequence[int]


@told
def convolve(
    x: Tensor,
    w: Tensor,
    layout: Layout | str,
    mesh: DeviceMesh,
    bias: Tensor | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    stride: Numbers = 1,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    save_gathered: Collection[str] = (),
    reduce_dtype: torch.dtype | None = None,
) -> Tensor:
    """The convolution of two sharded tensors (torch's cross-correlation), in the storage that the layout writes.

        y = convolve(x, w, "X[b,c,h,w] W[o/tp,c,i,j] -> Y[b,o/tp,p,q]", mesh, padding=1)

    Batch, in- and out-channels are letters like any others: an axis on o sums dX, an axis on c sums Y, one on b sums
    dW. A batched letter is the groups: `X[b,g/tp,c,h,w] W[g/tp,o,c,i,j] -> Y[b,g/tp,o,p,q]` communicates nothing, for a
    group needs its own channels only (torch's [b, g·c, h, w] is this tensor, `x.unflatten(1, (g, c))`). The last one,
    two or three dims of each tensor are those that the windows slide along: three letters for each, since the kernel,
    the input and the output have sizes of their own.

    Differentiable; each gradient comes back stored as its tensor is.

    Args:
        x, w, bias, sizes, save_gathered, reduce_dtype: as of `matmul`.
        layout: its text, or `Layout(text, spatial=2)`.
        stride, padding, dilation: as of F.conv2d: a number, or one for each spatial dim.

    Raises:
        LayoutError: the layout is illegal (an axis on a spatial letter, which would need halos), or is none of a
            convolution.
        ShapeError: the kernel is larger than the padded input, or a setting is out of range.
        And what `matmul` raises.
    Source: the derivation, section 6: a convolution is a contraction over in-channels and kernel of X's windows.
    """
    if torch.compiler.is_compiling():
        text, spatial = (layout.text, layout.spatial) if isinstance(layout, Layout) else (layout, None)
        of_product = bias is not None, mesh, tuple(save_gathered), reduce_dtype
        product = _bind_text(text, spatial, *of_product, stride, padding, dilation)
    else:
        layout = layout if isinstance(layout, Layout) else _layout(layout)
        operation = Convolution.of(layout, stride, padding, dilation)
        product = bind((layout,), (bias is not None,), mesh, save_gathered, reduce_dtype, operation)
    return run(product, x, [w], [] if bias is None else [bias], sizes)[0]


@shim.constant
def _bind_text(
    text: str,
    spatial: int | None,
    biased: bool,
    mesh: DeviceMesh,
    save_gathered: Collection[str],
    reduce_dtype: torch.dtype | None,
    stride: Numbers,
    padding: Numbers,
    dilation: Numbers,
) -> BoundMatmul:
    """`bind`, which torch.compile does not look into. spatial: None: as the text says."""
    layout = _layout(text) if spatial is None else Layout(text, spatial=spatial)
    return bind(
        (layout,), (biased,), mesh, save_gathered, reduce_dtype, Convolution.of(layout, stride, padding, dilation)
    )


@lru_cache(maxsize=512)
def _layout(text: str) -> Layout:
    """A convolution's layout: the letters that W alone has are those of the kernel."""
    written = parse(text)
    others = (*written.lhs.letters, *written.out.letters)
    return Layout(text, spatial=sum(letter not in others for letter in written.rhs.letters))


@dataclass(frozen=True, slots=True)
class Convolution:
    """The operation, settings in full: one number for each spatial dim."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def spatial(self) -> int:
        return len(self.stride)

    @classmethod
    def of(cls, layout: Layout, stride: Numbers, padding: Numbers, dilation: Numbers) -> Convolution:
        """Settings as the user gives them, for a layout.

        Raises:
            LayoutError: the layout is not one of a convolution.
            ShapeError: a setting has the wrong number of entries, or is out of range.
        """
        n = layout.spatial
        if n not in _TORCH:
            raise LayoutError(
                f"{layout} has {n} spatial dims; a convolution has one, two or three, whose letters stand in one "
                "tensor each: X[b,c,h,w] W[o,c,i,j] -> Y[b,o,p,q]"
            )
        return cls(
            numbers("stride", stride, n, 1), numbers("padding", padding, n, 0), numbers("dilation", dilation, n, 1)
        )

    def derive(self, layout: Layout, sizes: Sizes) -> None:
        """(size + 2·padding − dilation·(kernel − 1) − 1) // stride + 1, for each spatial dim."""
        n = self.spatial
        letters = zip(layout.lhs.letters[-n:], layout.rhs.letters[-n:], layout.out.letters[-n:])
        for at, (x, w, y) in enumerate(letters):
            size, kernel = sizes.get(x), sizes.get(w)
            if size is None or kernel is None:
                continue
            made = (size + 2 * self.padding[at] - self.dilation[at] * (kernel - 1) - 1) // self.stride[at] + 1
            if kernel < 1 or made < 1:
                raise ShapeError(
                    f"a kernel of {w} = {kernel} with dilation {self.dilation[at]} does not fit into {x} = {size} with "
                    f"padding {self.padding[at]} on both sides (in {layout})"
                )
            known = sizes.known.setdefault((y, ()), made)
            if known != made:
                raise ShapeError(f"sizes says {y} = {known}, but {x} = {size} and {w} = {kernel} make it {made}")

    def local(self, layout: Layout, sizes: Sizes) -> Local:
        return _local(self, layout, sizes)

    def __str__(self) -> str:
        return f"a convolution of stride {self.stride}, padding {self.padding}, dilation {self.dilation}"


def numbers(name: str, given: Numbers, count: int, least: int) -> tuple[int, ...]:
    """A setting as one number for each spatial dim.

    Raises:
        ShapeError: it is neither a number nor so many, or one is too small.
    """
    every = (given,) * count if isinstance(given, int) else tuple(given) if isinstance(given, list | tuple) else ()
    if len(every) != count or not all(isinstance(value, int) and value >= least for value in every):
        raise ShapeError(f"{name} is a whole number of at least {least}, or {count} of them, not {given!r}")
    return every


class _Order:
    """A tensor as its letters lie, and as torch's convolution wants it: two groups of letters merged to two dims."""

    def __init__(self, letters: Sequence[str], first: Sequence[str], second: Sequence[str], shape: Sequence[int]):
        n = len(letters) - len(first) - len(second)
        wanted = (*first, *second, *letters[len(letters) - n :])
        order = tuple(letters.index(letter) for letter in wanted)
        back = tuple(wanted.index(letter) for letter in letters)
        self.shape = tuple(shape)
        self._to = None if order == tuple(range(len(order))) else order
        self._from = None if self._to is None else back
        self._ordered = tuple(shape[at] for at in order)
        ends = len(first), len(first) + len(second)
        self.merged = (
            prod(self._ordered[: ends[0]]),
            prod(self._ordered[ends[0] : ends[1]]),
            *self._ordered[ends[1] :],
        )

    def merge(self, tensor: Tensor) -> Tensor:
        return (tensor if self._to is None else tensor.permute(self._to)).reshape(self.merged)

    def restore(self, merged: Tensor) -> Tensor:
        """A tensor of its own, which is no view, from a fresh result."""
        # Reshaped where it lies: a view could not be changed in place once it leaves an autograd Function.
        own = merged.contiguous().resize_(self._ordered)
        return own if self._from is None else own.permute(self._from).clone(memory_format=torch.contiguous_format)


class _Map:
    """torch's convolution on this rank's shapes, [b, g·c, …], [g·o, c, …] -> [b, g·o, …], or one of its transposes."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor] | None, left: _Order, right: _Order, out: _Order):
        self._call, self._left, self._right, self._out = call, left, right, out

    def __call__(self, left: Tensor, right: Tensor, into: Tensor | None = None, /) -> Tensor:
        if self._call is None:
            return left.new_zeros(self._out.shape) if into is None else into
        made = self._out.restore(self._call(self._left.merge(left), self._right.merge(right)))
        return made if into is None else into.add_(made)

    def add_to(self, main: Tensor, left: Tensor, right: Tensor, /) -> None:
        main.add_(self(left, right))

    def with_bias(self, left: Tensor, right: Tensor, bias: Tensor, /) -> Tensor:
        raise NotImplementedError("the bias of a convolution is added after its product")


def _local(settings: Convolution, layout: Layout, sizes: Sizes) -> Local:
    used = [layout.reading.compute_layout(spec).dims for spec in (layout.lhs, layout.rhs, layout.out)]
    rows, groups, inner, columns = layout.rows, layout.batched, layout.contracted, layout.columns
    x = _Order(layout.lhs.letters, rows, (*groups, *inner), sizes.shape_of(used[0]))
    w = _Order(layout.rhs.letters, (*groups, *columns), inner, sizes.shape_of(used[1]))
    y = _Order(layout.out.letters, rows, (*groups, *columns), sizes.shape_of(used[2]))
    if 0 in (*x.merged[:2], *w.merged[:2]):
        # torch refuses some shapes without elements; with no channel or no row there is nothing to add up.
        return Local(_Map(None, x, w, y), _Map(None, y, w, x), _Map(None, y, x, w))
    forward, grad_input, grad_weight = _TORCH[settings.spatial]
    given: dict[str, Any] = {
        "stride": settings.stride,
        "padding": settings.padding,
        "dilation": settings.dilation,
        "groups": prod(sizes.shape_of(dim for dim in used[0] if dim.letter in groups)),
    }
    return Local(
        _Map(lambda left, right: forward(left, right, **given), x, w, y),
        _Map(lambda dy, right: grad_input(x.merged, right, dy, **given), y, w, x),
        _Map(lambda dy, left: grad_weight(left, w.merged, dy, **given), y, x, w),
    )
