"""An embedding of somebody's model: its vocabulary sharded, or its features."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.comm.adjoint import all_reduce
from shardgrad.errors import LayoutError
from shardgrad.layout.notation import Dim
from shardgrad.models.features import Features, written
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.features import MergedDim, Part, StoredOutput
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel, Where
from shardgrad.nn.replicated import for_rows

_UNKNOWN = ("max_norm", "scale_grad_by_freq", "sparse")


class VocabularyEmbedding(VocabParallelEmbedding):
    """A `VocabParallelEmbedding` for a model that was written for one device: what comes out is of the table's dtype
    under autocast too, and scaled where the model scales it (Gemma).

    Shapes: ids [...] → [..., embedding_dim], replicated.
    """

    embed_scale: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        embed_scale: Tensor | None = None,
        scalar_embed_scale: float | None = None,
        **where: Unpack[Where],
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, **where)
        self.register_buffer("embed_scale", embed_scale, persistent=False)
        self.scalar_embed_scale = scalar_embed_scale

    def reset_buffers(self) -> None:
        """Compute the scale anew, as `_init_weights` of the model does for the embedding that this one stands for."""
        if self.embed_scale is not None and self.scalar_embed_scale is not None:
            self.embed_scale.fill_(self.scalar_embed_scale)

    def reset_parameters(self, generator: Any = None) -> None:
        """Nothing: the values are those of the embedding that this one stands for."""

    def stored_output(self) -> StoredOutput:
        """Replicated."""
        return StoredOutput(MergedDim((Part((Dim("d"),), (self.embedding_dim,)),)))

    def forward(self, ids: Tensor) -> Tensor:
        y = all_reduce(self._lookups(ids), self.mesh, self.axis)
        return y if self.embed_scale is None else y * self.embed_scale.to(y.dtype)


class FeatureEmbedding(ShardedModule):
    """A table whose features are sharded: `v -> h/tp` (a bias for each head). Nothing is communicated.

    Shapes: ids [...] → [..., features of this rank].
    """

    weight: Tensor
    leaves_sharded = True

    def __init__(
        self, features: Features, sizes: Mapping[str, int], padding_idx: int | None, parallel: Parallel
    ) -> None:
        super().__init__(parallel.mesh, features.axes)
        (part,) = features.parts
        shape = tuple(prod(sizes[dim.letter] for dim in letters) for letters in (features.into, part))
        text = f"W[{written(features.into)},{written(part)}]"
        merged = shape if len(features.into) + len(part) > 2 else None
        self.declare("weight", text, sizes, parallel.device, parallel.dtype, merged)
        self._stored = StoredOutput(MergedDim((Part(part, tuple(sizes[dim.letter] for dim in part), spread=True),)))
        self.features, self.padding_idx, self.data = features, padding_idx, parallel.data
        self._spread = prod(max(size, 1) for size in self._shardings["weight"].block()[1][len(features.into) :])

    def stored_output(self) -> StoredOutput:
        """This rank's features."""
        return self._stored

    def forward(self, ids: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.data is not None:
            (weight,) = for_rows([weight], [self._shardings["weight"]], (self.data.axis,))
        if 0 in weight.shape[1:]:  # as layers without heads
            return weight.new_zeros((*ids.shape, self._spread)) + weight.sum()
        return F.embedding(ids, weight, self.padding_idx)

    def extra_repr(self) -> str:
        return str(self.features)


def embedding(
    old: nn.Embedding, features: Features, sizes: Mapping[str, int], parallel: Parallel, name: str
) -> ShardedModule:
    """The sharded embedding that stands for one of a model; its parameter has no values yet.

    Raises:
        LayoutError: it has settings that this one has not, or the text shards both dims or none.
    """
    for setting in _UNKNOWN:
        if getattr(old, setting):
            raise LayoutError(f"{name} sets {setting}, which no sharded embedding has: leave it out of the plan")
    kind = features.kind(parallel.axis)
    if len(features.parts) > 1 or features.gathered or kind == "replicated":
        raise LayoutError(
            f"{name} is an embedding: 'v/{parallel.axis} -> d' or 'v -> d/{parallel.axis}', not {features}"
        )
    if kind == "column":
        return FeatureEmbedding(features, sizes, old.padding_idx, parallel)
    if len(features.letters) > 2 or any(len(dim.axes) > 1 for dim in features.letters):
        raise LayoutError(
            f"{name}: the vocabulary is one letter over one axis, as 'v/{parallel.axis} -> d'; not {features}"
        )
    scale = getattr(old, "embed_scale", None)
    return VocabularyEmbedding(
        old.num_embeddings,
        old.embedding_dim,
        old.padding_idx,
        embed_scale=scale,
        scalar_embed_scale=getattr(old, "scalar_embed_scale", None),
        parallel=parallel,
    )
