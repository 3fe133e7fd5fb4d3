"""The local product: one contraction of two tensors given by letters, done as a single (batched) matrix product."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from shardgrad.layout.contraction import Letters, arrange


class Contraction:
    """out = Σ left · right over the letters that `out` lacks.

    Permutations and reshapes are views wherever memory allows; BLAS reads transposed operands as they lie.
    """

    __slots__ = ("_batched", "_columns", "_left", "_right", "_rows", "_swap", "_unpermute")

    def __init__(self, left: Letters, right: Letters, out: Letters) -> None:
        found = arrange(left, right, out)
        self._swap, self._left, self._right, self._unpermute = found.swap, found.left, found.right, found.unpermute
        self._batched, self._rows, self._columns = found.batched, found.rows, found.columns

    def __call__(self, left: Tensor, right: Tensor, into: Tensor | None = None) -> Tensor:
        """The product, or `into` plus the product (in place where the order of the letters allows)."""
        if self._swap:
            left, right = right, left
        if self._left is not None:
            left = left.permute(self._left)
        if self._right is not None:
            right = right.permute(self._right)
        b, r, c = self._batched, self._rows, self._columns
        if b == 0 and r == 1 and c == 1 and left.dim() == 2 and right.dim() == 2:
            if into is not None and self._unpermute is None:
                return into.addmm_(left, right)
            out = torch.mm(left, right)
        else:
            batch, rows, inner = left.shape[:b], left.shape[b : b + r], left.shape[b + r :]
            columns = right.shape[right.dim() - c :]
            m, k, n = prod(rows), prod(inner), prod(columns)
            if b == 0 and into is not None and self._unpermute is None and into.is_contiguous():
                into.view(m, n).addmm_(left.reshape(m, k), right.reshape(k, n))
                return into
            # Made in its final shape: a view could not be changed in place once it leaves an autograd Function.
            out = left.new_empty((*batch, *rows, *columns))
            if b == 0:
                torch.mm(left.reshape(m, k), right.reshape(k, n), out=out.view(m, n))
            else:
                size = prod(batch)
                torch.bmm(left.reshape(size, m, k), right.reshape(size, k, n), out=out.view(size, m, n))
        if self._unpermute is not None:
            out = out.permute(self._unpermute).clone(memory_format=torch.contiguous_format)
        return out if into is None else into.add_(out)

    def with_bias(self, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        """The product plus a bias of its columns, in one pass (see `Arrangement.adds_bias`)."""
        shape, left, right = self.as_matrices(left, right)
        out = left.new_empty(shape)  # in its final shape, as above
        torch.addmm(bias.reshape(-1), left, right, out=out.view(left.shape[0], right.shape[1]))
        return out

    @property
    def rows(self) -> int:
        """How many leading dims of the product are rows of its one matrix product; 0 if it is batched or must be
        permuted (else `as_matrices` may be used)."""
        return self._rows if self._unpermute is None and self._batched == 0 else 0

    @property
    def lhs_has_rows(self) -> bool:
        """Whether those are the leading dims of the first operand too."""
        return not self._swap and self._left is None

    def as_matrices(self, left: Tensor, right: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """The product's shape, and the two matrices whose product it is."""
        if self._swap:
            left, right = right, left
        if self._left is not None:
            left = left.permute(self._left)
        if self._right is not None:
            right = right.permute(self._right)
        r, c = self._rows, self._columns
        shape = (*left.shape[:r], *right.shape[right.dim() - c :])
        m, k, n = prod(left.shape[:r]), prod(left.shape[r:]), prod(shape[r:])
        return shape, left.reshape(m, k), right.reshape(k, n)

    def add_to(self, main: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the product to `main`, which may be of a wider dtype: a sum of many 16-bit products.

        On CUDA the product then leaves the multiplier in the wider dtype; on CPUs it is rounded to its own before.
        """
        if main.dtype == left.dtype:
            self(left, right, main)
        elif main.is_cuda and main.dtype == torch.float32 and self._is_matrix and main.is_contiguous():
            _, left, right = self.as_matrices(left, right)
            torch.addmm(main, left, right, out_dtype=torch.float32, out=main)
        else:
            main.add_(self(left, right))

    @property
    def _is_matrix(self) -> bool:
        return (self._batched, self._rows, self._columns, self._unpermute) == (0, 1, 1, None)
