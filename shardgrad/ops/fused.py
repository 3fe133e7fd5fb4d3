"""Products that communicate as they multiply, in place of a product and its gather or reduce-scatter.

The same calls as of products in chunks (`chunks`), handed to torch's products over symmetric memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.fused import FusedGatherMatmul, FusedMatmulReduceScatter
from shardgrad.ops.chunks import Transfer, results
from shardgrad.ops.contract import Contraction


class GatherMatmul:
    """Products of one tensor that is gathered along a row dim. All have the same rows."""

    def __init__(self, products: Sequence[Contraction], transfer: Transfer, *, assemble: bool) -> None:
        self._products, self._dim, self._ranks = tuple(products), transfer.dim, transfer.axis.size
        self._fused = FusedGatherMatmul(transfer.axis, transfer.dim, transfer.what, returns_whole=assemble)

    def __call__(self, stored: Tensor, *others: Tensor) -> Any:
        """Each product with the whole tensor; and the whole tensor itself, if it is to be assembled."""
        found = [product.as_matrices(stored, other) for product, other in zip(self._products, others)]
        rows, left = self._products[0].rows, found[0][1]
        shard = left.view(*stored.shape[:rows], left.shape[1])
        whole, outs = self._fused.multiply(shard, [right for _, _, right in found])
        made = [shim.as_own_tensor(out, self._gathered(shape)) for out, (shape, _, _) in zip(outs, found)]
        kept = None if whole is None else shim.as_own_tensor(whole, self._gathered(stored.shape))
        return results(made, kept)

    def _gathered(self, shape: Sequence[int]) -> tuple[int, ...]:
        at = self._dim
        return (*shape[:at], self._ranks * shape[at], *shape[at + 1 :])


class MatmulReduceScatter:
    """A product that is summed over an axis, and scattered along one of its rows. All of it is done in `start`."""

    def __init__(self, product: Contraction, transfer: Transfer) -> None:
        self._product, self._dim, self._ranks = product, transfer.dim, transfer.axis.size
        self._fused = FusedMatmulReduceScatter(transfer.axis, transfer.dim, transfer.what)

    def start(self, left: Tensor, right: Tensor) -> Tensor:
        """This rank's chunk of the summed product."""
        shape, left, right = self._product.as_matrices(left, right)
        at = self._dim
        made = self._fused.multiply(left.view(*shape[: self._product.rows], left.shape[1]), right)
        return shim.as_own_tensor(made, (*shape[:at], shape[at] // self._ranks, *shape[at + 1 :]))

    @staticmethod
    def wait(made: Tensor) -> Tensor:
        """The same."""
        return made
