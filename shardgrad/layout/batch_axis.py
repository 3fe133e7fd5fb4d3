"""Data parallelism, written into layouts: which letter the axis splits, and whether weights are sharded over it too.

One axis of the mesh splits the batch, a row letter of every product. By the rule, W, which lacks that letter, is then
what is communicated along the axis: replicated (its gradient all-reduced), stored in shards (gathered, its gradient
reduce-scattered), or marked (its gradient left to the caller). Nobody writes these collectives; the layout has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardgrad.errors import LayoutError
from shardgrad.layout.notation import TensorSpec, parse_tensor


@dataclass(frozen=True, slots=True)
class BatchAxis:
    """How layers take part in data parallelism over an axis of the mesh, which splits the first dim of their input.

        W[m/tp,d]        replicated: dW is all-reduced over dp in every backward
        W[m/tp,d/dp]     shard_params=True: W is gathered in forward and in backward, dW reduce-scattered
        W[m/tp,d]{dp}    accumulate=True: dW is left partial, and `sg.all_reduce_partial_grads_` sums several at once

    Args:
        axis: of the mesh.
        shard_params: whether matrices are sharded over the axis too ("fully sharded"), on the longest dim that no axis
            shards. Vectors (biases and the parameters of norms) stay replicated: each would be a collective of its own,
            for a thousandth of the memory.
        accumulate: whether gradients of what is replicated over the axis are left partial. What is sharded is
            reduce-scattered in every backward all the same: only then are its gradients in shards.
    """

    axis: str = "dp"
    shard_params: bool = False
    accumulate: bool = False

    def storage(self, spec: TensorSpec | str, sizes: Mapping[str, int], *, vector: bool = False) -> TensorSpec:
        """How a parameter, without the axis stored as `spec`, is stored.

        Args:
            sizes: the global size of each of its letters.
            vector: whether it is a bias or a norm's parameter, whatever its dims: then it is never sharded.

        Raises:
            LayoutError: `spec` has the axis already.
        """
        spec = parse_tensor(spec) if isinstance(spec, str) else spec
        if self.axis in spec.axes:
            raise LayoutError(f"{spec} is sharded over {self.axis} already: it cannot also be the data parallel axis")
        if self.shard_params and not vector:
            free = [dim for dim in spec.dims if not dim.axes] or list(spec.dims)
            longest = max(free, key=lambda dim: sizes[dim.letter])
            return spec.with_axes({longest.letter: (*longest.axes, self.axis)})
        return replace(spec, grad_partial=(*spec.grad_partial, self.axis)) if self.accumulate else spec
