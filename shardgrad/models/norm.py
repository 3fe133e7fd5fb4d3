"""A norm over features that are sharded (OLMo 2 normalises queries and keys over all heads)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError
from shardgrad.layout.sizes import slab
from shardgrad.models.features import Features, written
from shardgrad.nn.features import MergedDim, Part, StoredOutput
from shardgrad.nn.heads import Heads
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel
from shardgrad.nn.replicated import for_rows
from shardgrad.nn.sharded_norm import sharded_layer_norm, sharded_rms_norm, summed


class FeatureNorm(ShardedModule):
    """RMSNorm or LayerNorm over features that are sharded: `h/tp,k`; see `nn.sharded_norm`.

    heads: where KV heads `g` are not those of this rank's query heads. x has one for each query head; the weight is
        stored whole, and each KV head counts once in the sum, on the rank of the first of its query heads.

    Shapes: x [..., features of this rank] → the same.
    """

    weight: Tensor
    bias: Tensor | None
    leaves_sharded = True

    def __init__(
        self,
        features: Features,
        sizes: Mapping[str, int],
        *,
        centred: bool,
        bias: bool,
        eps: float | None,
        heads: Heads | None,
        parallel: Parallel,
    ) -> None:
        super().__init__(parallel.mesh, parallel.axes)
        (letters,) = features.parts
        self.features, self.centred, self.eps, self.axis, self.data = (
            features,
            centred,
            eps,
            parallel.axis,
            parallel.data,
        )
        self.heads = heads if letters[0].letter == "g" else None
        self.size = prod(sizes[dim.letter] for dim in letters)
        stored = written(letters) if self.heads is None else ",".join(dim.letter for dim in letters)
        merged = (self.size,) if len(letters) > 1 else None
        self.declare("weight", f"W[{stored}]", sizes, parallel.device, parallel.dtype, merged)
        if bias:
            self.declare("bias", f"B[{stored}]", sizes, parallel.device, parallel.dtype, merged)
        else:
            self.register_parameter("bias", None)
        ranks = view(self.mesh).shape
        self._counts = [
            prod(
                slab(sizes[d.letter], d.axes, ranks, {**view(self.mesh).coordinate, self.axis: at})[1] for d in letters
            )
            for at in range(ranks[self.axis])
        ]

    def stored_output(self) -> StoredOutput:
        """As x."""
        (letters,) = self.features.parts
        sizes = self._shardings["weight"].shape
        queries = None if self.heads is None else self.heads.queries
        return StoredOutput(MergedDim((Part(letters, sizes, queries, spread=True),)))

    def forward(self, x: Tensor) -> Tensor:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        shardings = list(self._shardings.values())
        if self.data is not None:
            parameters = for_rows(parameters, shardings, (self.data.axis,))
        if self.heads is not None:
            return self._for_queries(x, for_rows(parameters, shardings, (self.axis,))[0], self.heads)
        weight, bias = parameters[0], parameters[1] if self.bias is not None else None
        own = x if weight.numel() else x.narrow(-1, 0, 0)  # what a rank without heads has instead
        if self.centred:
            y = sharded_layer_norm(own, weight, bias, self.eps or 0.0, self._counts, self.mesh, self.axis)
        else:
            y = sharded_rms_norm(own, weight, self.eps, self.size, self.mesh, self.axis)
        return y if own is x else x + y.sum()

    def _for_queries(self, x: Tensor, weight: Tensor, heads: Heads) -> Tensor:
        """The norm of KV heads of which x has one for each of this rank's query heads."""
        each = weight.view(heads.groups, -1)
        share = heads.queries // heads.groups
        wide = x.to(torch.promote_types(torch.promote_types(x.dtype, torch.float32), weight.dtype))
        wide = wide.unflatten(-1, (-1, each.shape[1]))
        # Slices, not lists of indices, which would be copied from the host.
        squares = wide[..., -heads.first % share :: share, :].square().sum((-2, -1))  # each KV head once
        total = summed(squares, self.mesh, self.axis)
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        y = wide * torch.rsqrt(total / self.size + eps)[..., None, None]
        if not heads.count:
            return x + (y.sum() + each.sum()).to(x.dtype) * 0
        return (y * each.repeat_interleave(share, 0).narrow(0, heads.first, heads.count)).flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.features}, {'LayerNorm' if self.centred else 'RMSNorm'}, eps={self.eps}"


def norm(
    old: Any, features: Features, sizes: Mapping[str, int], heads: Heads | None, parallel: Parallel, name: str
) -> ShardedModule:
    """The sharded norm that stands for one of a model; its parameters have no values yet.

    Raises:
        LayoutError: it is a norm of a kind that is not known.
    """
    kind = type(old)
    centred = kind is nn.LayerNorm
    llama = kind.__name__.endswith("RMSNorm") and hasattr(old, "variance_epsilon")  # weight · x / √(mean x² + ε)
    if not (centred or llama or kind is nn.RMSNorm):
        raise LayoutError(
            f"{name} is a {kind.__name__}: of norms, nn.LayerNorm, nn.RMSNorm and RMSNorms as Llama's are known over "
            "sharded features; leave it out of the plan if it is over one head's"
        )
    if features.kind(parallel.axis) != "column":
        raise LayoutError(
            f"{name}: {features} shards none of its features over {parallel.axis}: leave it out of the plan"
        )
    bias = getattr(old, "bias", None) is not None
    if bias and heads is not None:
        raise LayoutError(f"{name} has a bias: over KV heads that ranks share, norms without one are known")
    eps = old.variance_epsilon if llama else old.eps
    return FeatureNorm(features, sizes, centred=centred, bias=bias, eps=eps, heads=heads, parallel=parallel)
