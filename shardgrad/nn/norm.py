"""Norms over the last dims, whose rows, or whose features, may be sharded over an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.arguments import told
from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.cost import Collective, itemsize
from shardgrad.layout.notation import parse_tensor
from shardgrad.layout.sizes import slab
from shardgrad.nn.feature_pieces import ShardedFeatures, norm_of_features, norm_of_features_collectives
from shardgrad.nn.layer import Layer
from shardgrad.nn.parallel import OnRows
from shardgrad.nn.pieces import Cut, counts, is_exact, row_pieces, row_pieces_collectives, rows_of
from shardgrad.nn.sharded_norm import MomentsNorm, SquaresNorm, weight_and_bias
from shardgrad.nn.template import AXIS
from shardgrad.ops.pieces import cut, join


class _Norm(Layer):
    weight: Tensor | None
    bias: Tensor | None
    takes = OnRows
    _kind: ClassVar[str]  # of `sharded_norm_collectives`

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        affine: bool,
        bias: bool,
        stored: str | None,
        sizes: Mapping[str, int] | None,
        where: Mapping[str, Any],
    ) -> None:
        super().__init__(where)
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self._features: ShardedFeatures | None = None
        letters, merged = self._letters() if stored is None else self._letters_of(stored, sizes)
        for name, there in (("weight", affine), ("bias", affine and bias)):
            if there:
                spec = parse_tensor(f"{name[0].upper()}[{letters}]")
                self.add(name, self.stored(spec, vector=True), merged)
            else:
                self.register_parameter(name, None)
        self.reset_parameters()

    def _letters(self) -> tuple[str, None]:
        count = len(self.normalized_shape)
        self._sizes = dict(zip(("m",) if count == 1 else [f"m{at}" for at in range(count)], self.normalized_shape))
        return ",".join(self._sizes), None

    def _letters_of(self, stored: str, sizes: Mapping[str, int] | None) -> tuple[str, tuple[int, ...] | None]:
        user, shape = type(self).__name__, self.normalized_shape
        dims = parse_tensor(f"W[{stored}]").dims
        by_dim = len(shape) == len(dims)  # a letter for each, whose size it is
        self._sizes = dict(zip((dim.letter for dim in dims), shape)) if by_dim and sizes is None else dict(sizes or {})
        known = tuple(self._sizes[dim.letter] for dim in dims if dim.letter in self._sizes)
        if len(known) != len(dims) or (known != shape if by_dim else len(shape) != 1 or prod(known) != shape[0]):
            raise ShapeError(
                f"{user}({shape}, stored={stored!r}, sizes={sizes}): the letters are those of the normalized dims, one "
                "each; or of one dim, which the product of their sizes is"
            )
        if [dim.axes for dim in dims if dim.axes] != [(AXIS,)]:
            raise LayoutError(
                f"{user}: stored={stored!r} must shard one letter over the layer's axis, which is written {AXIS!r}"
            )
        if self.sequence_dim is not None:
            raise LayoutError(
                f"{user}: axis {self.axis!r} shards either features (stored={stored!r}) or rows "
                f"(sequence_dim={self.sequence_dim}), not both"
            )
        at = next(at for at, dim in enumerate(dims) if dim.axes)
        self._features = ShardedFeatures.of(known, at, view(self.mesh).axis(self.axis))
        return stored, None if by_dim else shape

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Ones and zeros, as torch's."""
        with torch.no_grad():
            if self.weight is not None:
                self.weight.fill_(1)
            if self.bias is not None:
                self.bias.zero_()

    def _normed(self, x: Tensor, norm: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]) -> Tensor:
        """The norm of x, by weight and bias as this rank's rows use them: where rows are sharded, their gradients are
        summed, both in one all-reduce for each axis, but for one that they are marked with."""
        used, dims = self._used(x)
        if not is_exact(self.mesh):
            return norm(x, *weight_and_bias(used[0]))
        along = counts(self.mesh, dims, x)
        pieces = cut(x, along)
        used = used * len(pieces) if len(used) == 1 else used
        return join([norm(piece, *weight_and_bias(each)) for piece, each in zip(pieces, used, strict=True)], along)

    def _normed_over_features(self, x: Tensor, norm: SquaresNorm | MomentsNorm) -> Tensor:
        """The norm of x [..., features of this rank], likewise."""
        used, dims = self._used(x)
        assert self._features is not None
        several = len(self.normalized_shape)
        if several == 1:
            return norm_of_features(norm, x, used, dims, self._features, self.mesh, self.axis)
        flat = [[parameter.flatten() for parameter in each] for each in used]
        made = norm_of_features(norm, x.flatten(-several), flat, dims, self._features, self.mesh, self.axis)
        return made.view(x.shape)

    def _used(self, x: Tensor) -> tuple[list[list[Tensor]], Cut]:
        """Weight and bias, as far as there are any, for each piece of the rows; and these."""
        self._check(x)
        parameters = [one for one in (self.weight, self.bias) if one is not None]
        dims = self._rows(x.dim())
        return row_pieces(parameters, list(self._shardings.values()), self.mesh, dims), dims

    def _rows(self, dims: int) -> Cut:
        """The rows that axes shard, of x of so many dims."""
        sequence = None if self.sequence_dim is None else (self.sequence_dim % dims, self.axis)
        return rows_of(self.data, sequence)

    def _check(self, x: Tensor) -> None:
        rows = x.dim() - len(self.normalized_shape)
        if self._features is not None:
            here = self._features.here
            here = here if len(self.normalized_shape) == len(here) else (prod(here),)
            if tuple(x.shape[max(rows, 0) :]) != here:
                raise ShapeError(
                    f"{type(self).__name__}: x has local shape {tuple(x.shape)}, but this rank has {here} of the "
                    f"{self.normalized_shape} features, which are the last dim{'s' * (len(here) > 1)}"
                )
        if self.sequence_dim is not None and (
            not -x.dim() <= self.sequence_dim < x.dim() or self.sequence_dim % x.dim() >= rows
        ):
            raise ShapeError(
                f"{type(self).__name__}: sequence_dim={self.sequence_dim} of an input of shape {tuple(x.shape)} is not "
                f"a row dim (the last {len(self.normalized_shape)} are normalized)"
            )

    def collectives(self, shape: Sequence[int], dtype: Any = None) -> list[Collective]:
        """Every collective of this rank's forward and backward.

        Args:
            shape, dtype: of the global x; they matter where features are sharded.
        """
        shardings = list(self._shardings.values())
        own = None if self.weight is None else self.weight.dtype
        found = list(row_pieces_collectives("dW and db", shardings, self.mesh, self._rows(len(shape)), own))
        if self._features is None:
            return found
        rows = list(shape[: -len(self.normalized_shape)])
        if self.data is not None:
            mesh_view = view(self.mesh)
            rows[0] = slab(rows[0], (self.data.axis,), mesh_view.shape, mesh_view.coordinate)[1]
        wide = max((one for one in (own, dtype, "float32") if one is not None), key=itemsize)
        return [*norm_of_features_collectives(self._kind, prod(rows), wide, self.mesh, self.axis), *found]

    def extra_repr(self) -> str:
        stored = "" if self._features is None else f", features={list(self._features.of_ranks)}"
        return f"{self.normalized_shape}, affine={self.weight is not None}, {self._flags()}{stored}"


class LayerNorm(_Norm):
    """nn.LayerNorm whose parameter gradients are complete also where each rank has only some of the rows.

    With `sequence_dim` the gradients of weight and bias are summed over the axis, in one all-reduce; without it every
    rank has all the rows, and nothing is summed. With `stored` each rank has some of the features, and parameters of
    these; x is [..., features of this rank], and a few numbers for each row are exchanged (see `nn.sharded_norm`).

        sg.RMSNorm((5, 3), stored="h/tp,k", mesh=mesh)  # over all heads, which tp shards: x [..., h/tp, k]
        sg.RMSNorm(15, stored="h/tp,k", sizes={"h": 5, "k": 3}, mesh=mesh)  # x [..., heads and their features]

    Args:
        normalized_shape, eps, elementwise_affine, bias: as of nn.LayerNorm.
        stored: how the normalized dims are sharded: a letter each, or several letters of one dim; one of them has the
            layer's axis, written `tp`.
        sizes: the global size of each of several letters of one dim.
        parallel, or mesh, axis, sequence_dim, data, device, dtype: as of `Parallel`. Without `stored`, parameters are
            replicated.

    Raises:
        ShapeError: the letters of `stored` are not the normalized dims.
        LayoutError: `stored` shards no letter, or several, or rows are sharded by the same axis.
    """

    _kind = "layer"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        stored: str | None = None,
        sizes: Mapping[str, int] | None = None,
        **where: Unpack[OnRows],
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, bias, stored, sizes, where)
        self.eps = eps

    @told
    def forward(self, x: Tensor) -> Tensor:
        if self._features is not None:
            return self._normed_over_features(x, MomentsNorm(self._features.of_ranks, self.eps))

        def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            wide = x if weight is None else x.to(weight.dtype)  # 16-bit activations and float32 parameters: in float32
            return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)

        return self._normed(x, norm)


class RMSNorm(_Norm):
    """nn.RMSNorm whose weight gradient is complete also where each rank has only some of the rows.

    Arguments as of nn.RMSNorm and of `LayerNorm`.
    """

    _kind = "rms"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        stored: str | None = None,
        sizes: Mapping[str, int] | None = None,
        **where: Unpack[OnRows],
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, False, stored, sizes, where)
        self.eps = eps

    @told
    def forward(self, x: Tensor) -> Tensor:
        if self._features is not None:
            return self._normed_over_features(x, SquaresNorm(prod(self.normalized_shape), self.eps))

        def norm(x: Tensor, weight: Tensor | None, _: Tensor | None) -> Tensor:
            wide = x if weight is None else x.to(weight.dtype)
            return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(x.dtype)

        return self._normed(x, norm)
