"""The local mathematics of one layout: its operation with the two transposes, and how a bias lies in the product."""

from __future__ import annotations

from torch import Tensor

from shardgrad.comm.mesh import MeshView
from shardgrad.layout.layout import Layout
from shardgrad.ops.bilinear import Local


class Terms:
    """Y of X and W; dX of dY and W; dW of dY and X; db = Σ dY over the letters that the bias lacks."""

    def __init__(self, layout: Layout, view: MeshView, local: Local) -> None:
        self.out, self.grad_lhs, self.grad_rhs = local
        y, b = layout.out.letters, layout.bias.letters
        self._permute = tuple(b.index(letter) for letter in y if letter in b)
        self._permute_back = tuple([letter for letter in y if letter in b].index(letter) for letter in b)
        self._ones = tuple(at for at, letter in enumerate(y) if letter not in b)
        self._trailing = y[len(y) - len(b) :] == b
        # A sum that is left to the caller is made of one term a rank: only one of them may hold the bias.
        self._adds_bias = all(view.coordinate[axis] == 0 for axis in layout.out.partial)

    def out_and_bias_source(self, x: str, w: str, bias: str) -> str | None:
        """Product and bias as one expression, where torch has it: a matrix times a matrix, plus a row."""
        if self.out.is_linear and self._adds_bias and self._trailing and self._ones == (0,):
            return f"linear({x}, {w}, {bias})"
        return None

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """y plus the bias, in place: y is a fresh local product."""
        if not self._adds_bias:
            return y
        if not self._trailing:
            bias = bias.permute(self._permute)
            for at in self._ones:
                bias = bias.unsqueeze(at)
        return y.add_(bias)

    def grad_bias(self, dy: Tensor) -> Tensor:
        """dY summed over the letters that the bias lacks, in the bias's order; a tensor of its own."""
        db = dy.sum(self._ones) if self._ones else dy.clone()
        return db.permute(self._permute_back)
