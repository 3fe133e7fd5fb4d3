"""The sharded modules that stand for those of a model, before anything of the model is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError
from shardgrad.layout.notation import Dim
from shardgrad.layout.sizes import slab
from shardgrad.models.embedding import embedding
from shardgrad.models.entrance import Entrance
from shardgrad.models.experts import DOWN, FeatureExperts
from shardgrad.models.features import Features, Letters, complete, division
from shardgrad.models.linear import FeatureLinear
from shardgrad.models.plan import Assigned, Laid, is_conv1d
from shardgrad.nn.heads import Heads
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_SAME = ("transformers.pytorch_utils.Conv1D", "transformers.models.falcon.modeling_falcon.FalconLinear")


class Builder:
    """Makes the modules of one call of `parallelize`.

    Args:
        sizes: of letters, as given.
        sequence: whether activations are sharded along the sequence between the layers.
        known: what is known of the architecture's own layers, by their identity: its programs read them so.
    """

    def __init__(
        self, laid: Laid, sizes: Mapping[str, int], parallel: Parallel, sequence: bool, known: Mapping[int, Features]
    ) -> None:
        self.laid, self.sizes, self.parallel, self.sequence = laid, dict(sizes), parallel, sequence
        self.known = known
        self.over = view(parallel.mesh).axis(parallel.axis)
        self.heads = self._heads()
        self.made: dict[str, ShardedModule] = {}
        self._entrances: dict[tuple[str, Letters], Entrance] = {}

    def _heads(self) -> Heads | None:
        """How KV heads g belong to query heads h, where the axis shards both."""
        texts = [one.features for one in (*self.laid.modules, *self.laid.integers)]
        sharded = {dim.letter for text in texts for dim in text.letters if self.parallel.axis in dim.axes}
        if "h" not in sharded or "g" not in sharded or not {"h", "g"} <= set(self.sizes):
            return None
        h, g = self.sizes["h"], self.sizes["g"]
        if h % g:
            raise LayoutError(f"sizes: g={g} KV heads do not divide h={h} query heads: as many query heads share each")
        return Heads.of(h, g, self.over.size, self.over.index)

    @property
    def unaligned(self) -> Heads | None:
        """The heads, where the KV heads that a rank needs are not those that it would store."""
        return None if self.heads is None or self.heads.aligned else self.heads

    def build(self) -> None:
        """Make all of them.

        Raises:
            LayoutError: a text does not fit its module, or the module is of a kind that is not known.
        """
        columns = [one for one in self.laid.modules if self._kind(one) == "column" and _linear(one.module)]
        users: dict[tuple[str, Letters], int] = {}
        for one in columns:
            key = one.plain.rpartition(".")[0], one.features.into
            users[key] = users.get(key, 0) + 1
        for one in self.laid.modules:
            key = one.plain.rpartition(".")[0], one.features.into
            self.made[one.name] = self._module(one, users.get(key, 0), key)
        for name, module, texts in self.laid.experts:
            self.made[name] = FeatureExperts(module, texts, self.sizes, self._for(getattr(module, DOWN)), name)

    def _kind(self, one: Assigned) -> str:
        return one.features.kind(self.parallel.axis)

    def _for(self, parameter: Tensor) -> Parallel:
        """Where the modules for a parameter lie."""
        device = parameter.device if parameter.is_meta else view(self.parallel.mesh).device
        return replace(self.parallel, device=device, dtype=parameter.dtype)

    def _module(self, one: Assigned, users: int, key: tuple[str, Letters]) -> ShardedModule:
        module, features, name = one.module, one.features, one.plain
        for axis in features.axes:
            view(self.parallel.mesh).require([axis], f"{features} of {name}")
        if isinstance(module, nn.Embedding):
            return self._embedding(one, module)
        if not features.into:
            return self._norm(one)
        if not _linear(module):
            raise LayoutError(
                f"{name} is a {_kind_of(module)}: a plan shards nn.Linear, transformers' Conv1D, nn.Embedding, "
                "norms and experts themselves; a subclass may compute something else. Leave it out of the plan, or "
                "name what is in it"
            )
        weight: Any = module.weight
        transposed = is_conv1d(module)
        n_out, n_in = weight.shape[::-1] if transposed else weight.shape
        sizes = self._complete(features, n_in, n_out, name)
        self._check_known(one, sizes, n_in, n_out)
        entrance = None
        if self._kind(one) == "column" and (users > 1 or self.sequence):
            entrance = self._entrances.setdefault(key, Entrance(self.parallel, users))
        sequence_dim = 1 if self.sequence and self._kind(one) == "row" else None
        return FeatureLinear(
            features,
            sizes,
            module.bias is not None,
            transposed=transposed,
            heads=self.unaligned,
            entrance=entrance,
            parallel=replace(self._for(weight), sequence_dim=sequence_dim),
        )

    def _check_known(self, one: Assigned, sizes: Mapping[str, int], n_in: int, n_out: int) -> None:
        """Refuse a plan that divides features otherwise than the program of a known architecture reads them."""
        known, axis = self.known.get(id(one.module)), self.parallel.axis
        if known is None or self._kind(one) == "replicated":
            return
        right = self._complete(known, n_in, n_out, one.plain)
        theirs = [division(letters, right, axis) for letters in (known.into, *known.parts)]
        mine = [division(letters, sizes, axis) for letters in (one.features.into, *one.features.parts)]
        if mine != theirs:
            raise LayoutError(
                f"{one.plain} is stored as {known} by this architecture's own program, not as {one.features}: its "
                "heads or parts would be taken for others"
            )

    def _complete(self, features: Features, n_in: int, n_out: int, name: str) -> dict[str, int]:
        sizes = complete(features.into, n_in, self.sizes, f"{name}: its input")
        if len(features.parts) == 1:
            return sizes | complete(features.parts[0], n_out, self.sizes | sizes, f"{name}: its output")
        for part in features.parts:
            sizes |= {dim.letter: self.sizes[dim.letter] for dim in part if dim.letter in self.sizes}
        missing = [dim.letter for part in features.parts for dim in part if dim.letter not in sizes]
        made = 0 if missing else sum(prod(sizes[dim.letter] for dim in part) for part in features.parts)
        if missing or made != n_out:
            raise LayoutError(
                f"{name}: its output has {n_out} features, but {features} with {sizes} makes {made or '?'}"
                + (f": give sizes={{{missing[0]!r}: …}}" if missing else "")
            )
        return sizes

    def _embedding(self, one: Assigned, module: nn.Embedding) -> ShardedModule:
        scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
        if type(module) is not nn.Embedding and not scaled:
            raise LayoutError(
                f"{one.plain} is a {_kind_of(module)}, which may do more than nn.Embedding: leave it out of the plan"
            )
        sizes = complete(one.features.into, module.num_embeddings, self.sizes, f"{one.plain}: its vocabulary")
        (part,) = one.features.parts
        sizes |= complete(part, module.embedding_dim, self.sizes | sizes, f"{one.plain}: its features")
        return embedding(module, one.features, sizes, self._for(module.weight), one.plain)

    def _norm(self, one: Assigned) -> ShardedModule:
        from shardgrad.models.norm import norm

        (part,) = one.features.parts
        weight: Any = getattr(one.module, "weight", None)
        if weight is None or weight.dim() != 1:
            raise LayoutError(
                f"{one.plain} is a {_kind_of(one.module)}: {one.features} is of a norm with one weight a feature"
            )
        sizes = complete(part, weight.shape[0], self.sizes, one.plain)
        return norm(one.module, one.features, sizes, self.unaligned, self._for(weight), one.plain)

    def number(self, one: Assigned) -> int:
        """This rank's value of an integer that counts features or heads; at least 1, as ranks without heads have one of
        zeros."""
        mesh_view, (part,) = view(self.parallel.mesh), one.features.parts
        owner = one.module.config if one.attribute.startswith("config.") else one.module
        value = getattr(owner, one.attribute.removeprefix("config."))
        sizes = complete(part, value, self.sizes, f"{one.plain}.{one.attribute}")

        def local(dim: Dim) -> int:
            if self.unaligned is not None and dim.letter == "g":
                return self.unaligned.count
            return slab(sizes[dim.letter], dim.axes, mesh_view.shape, mesh_view.coordinate)[1]

        return prod(max(local(dim), 1) for dim in part)


def _linear(module: nn.Module) -> bool:
    kind = type(module)
    return kind in _LINEAR or f"{kind.__module__}.{kind.__name__}" in _SAME


def _kind_of(module: nn.Module) -> str:
    bases = [base.__name__ for base in type(module).__mro__ if base in (nn.Linear, nn.Embedding)]
    return type(module).__name__ + (f" (a subclass of nn.{bases[0]})" if bases else "")


@torch.no_grad()
def fill(new: ShardedModule, old: nn.Module) -> None:
    """Give a sharded module this rank's part of what the old one has."""
    for name, sharding in new.shardings().items():
        whole, parameter = old._parameters[name], new.get_parameter(name)
        assert whole is not None
        if not whole.is_meta:
            parameter.copy_(sharding.shard(whole))
        parameter.requires_grad_(whole.requires_grad)
