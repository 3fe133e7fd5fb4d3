"""What a layout distributes: a bilinear map of two local tensors, with its two transposes beside it.

| operation     | Y = f(X, W)              | dX                              | dW                              |
| ------------- | ------------------------ | ------------------------------- | ------------------------------- |
| `Contraction` | Σ X W                    | Σ dY W                          | Σ dY X                          |
| `Convolution` | windows of X, times W    | dY spread over windows, times W | windows of X, times dY          |

The rule asks of it only that it is linear in each operand, and that letters mean what they say: a sum over a contracted
letter's parts is the sum of the parts' products. Another such map is another row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from shardgrad.layout.layout import Layout
from shardgrad.layout.sizes import Sizes
from shardgrad.ops.contract import Contraction


class Map(Protocol):
    """A bilinear map of two local tensors, or its sum with `into`, which may be changed. The result is a tensor of its
    own, no view: it is reduced, and a bias added to it, in place."""

    def __call__(self, left: Tensor, right: Tensor, into: Tensor | None = None, /) -> Tensor: ...

    def add_to(self, main: Tensor, left: Tensor, right: Tensor, /) -> None:
        """Add the result to `main`, which may be of a wider dtype."""

    def with_bias(self, left: Tensor, right: Tensor, bias: Tensor, /) -> Tensor:
        """The result plus a bias; only for a product of matrices."""


class Local(NamedTuple):
    """The map and its transposes for one set of local shapes: of (X, W), of (dY, W), of (dY, X)."""

    out: Map
    grad_lhs: Map
    grad_rhs: Map


class Operation(Protocol):
    """A kind of product, with its settings; equal settings are equal, and hash alike.

    spatial: how many dims of each tensor it slides along, as `Layout.spatial`.
    """

    @property
    def spatial(self) -> int: ...

    def derive(self, layout: Layout, sizes: Sizes) -> None:
        """Add the sizes of the product's spatial letters, as far as those they follow from are known."""

    def local(self, layout: Layout, sizes: Sizes) -> Local:
        """What to compute where every size is known."""


class _Contract:
    """The product of `matmul`: one letter, one size, so that nothing has to be derived."""

    spatial = 0

    def derive(self, layout: Layout, sizes: Sizes) -> None:
        pass

    def local(self, layout: Layout, sizes: Sizes) -> Local:
        x, w, y = layout.lhs.letters, layout.rhs.letters, layout.out.letters
        return Local(Contraction(x, w, y), Contraction(y, w, x), Contraction(y, x, w))

    def __str__(self) -> str:
        return "a product"


CONTRACT: Operation = _Contract()
