"""Group norm of channels that an axis shards; groups that lie on several ranks are put together of their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.arguments import told
from shardgrad.comm.adjoint import all_gather
from shardgrad.comm.mesh import view
from shardgrad.comm.pieces import refuse_exact_on
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.cost import Collective, itemsize
from shardgrad.layout.notation import parse_tensor
from shardgrad.layout.sizes import slab
from shardgrad.nn.features import Part
from shardgrad.nn.layer import Layer
from shardgrad.nn.parallel import OnRows
from shardgrad.nn.replicated import for_rows, for_rows_collectives, one
from shardgrad.nn.sharded_norm import together, weight_and_bias
from shardgrad.nn.template import AXIS


class GroupNorm(Layer):
    """nn.GroupNorm of [n, channels of this rank, ...], where an axis shards the channels.

    Groups that lie on one rank are normalized there. Of each group that several ranks have a part of, the parts' means
    and sums of squares are exchanged: forward: one all-gather of 2 numbers for each such group and row; backward: their
    reduce-scatter. The gradients of weight and bias are local. Where no group is in parts, nothing is sent: so it is if
    the ranks divide the groups, or if `stored` shards the groups' own letter.

        sg.GroupNorm(4, 24, mesh=mesh)  # behind sg.Conv2d(…, 24, …), whose channels an axis shards
        sg.GroupNorm(5, 15, stored="h/tp,k", sizes={"h": 5, "k": 3}, mesh=mesh)  # each head by itself: nothing is sent

    Args:
        num_groups, num_channels, eps, affine: as of nn.GroupNorm.
        stored: how the channels are sharded: letters, one of them with the layer's axis, written `tp`.
        sizes: the global size of each letter; of one letter alone, it is known.
        parallel, or mesh, axis, data, device, dtype: as of `Parallel`; data shards n, and the gradients of weight and
            bias are summed over it.

    Raises:
        ShapeError: num_groups does not divide num_channels, or the letters of `stored` are not the channels.
        LayoutError: `stored` shards no letter, or several; `sequence_dim` is given.
    Source: Wu and He 2018, arXiv 1803.08494, equations 1, 2 and 7; parts put together as in `sharded_layer_norm`.
    """

    weight: Tensor | None
    bias: Tensor | None
    takes = OnRows

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        stored: str = "c/tp",
        sizes: Mapping[str, int] | None = None,
        **where: Unpack[OnRows],
    ) -> None:
        super().__init__(where)
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        if num_groups < 1 or num_channels < 1 or num_channels % num_groups:
            raise ShapeError(f"GroupNorm: num_groups={num_groups} must divide num_channels={num_channels}")
        dims = parse_tensor(f"W[{stored}]").dims
        self._sizes = {dim.letter: num_channels for dim in dims} if sizes is None else dict(sizes)
        known = tuple(self._sizes[dim.letter] for dim in dims if dim.letter in self._sizes)
        if len(known) != len(dims) or prod(known) != num_channels:
            raise ShapeError(
                f"GroupNorm: the product of the sizes of {stored!r}, {dict(self._sizes)}, is not "
                f"num_channels={num_channels}: give the size of each letter"
            )
        if [dim.axes for dim in dims if dim.axes] != [(AXIS,)]:
            raise LayoutError(
                f"GroupNorm: stored={stored!r} must shard one letter over the layer's axis, which is written {AXIS!r}; "
                "where every rank has all channels, nn.GroupNorm is enough"
            )
        if self.sequence_dim is not None:
            raise LayoutError(
                f"GroupNorm: axis {self.axis!r} shards channels (stored={stored!r}), not rows "
                f"(sequence_dim={self.sequence_dim})"
            )
        spec = parse_tensor(f"W[{stored}]")
        for name in ("weight", "bias"):
            if affine:
                self.add(name, self.stored(spec, vector=True), (num_channels,) if len(dims) > 1 else None)
            else:
                self.register_parameter(name, None)
        self._place(Part(tuple(dims), known))
        self.reset_parameters()

    def _place(self, channels: Part) -> None:
        """Which groups this rank has channels of, and which of them others have as well."""
        over, size = view(self.mesh).axis(self.axis), self.num_channels // self.num_groups
        of_ranks = [channels.indices({AXIS: over.size}, {AXIS: rank}) // size for rank in range(over.size)]
        counts = torch.stack([torch.bincount(groups, minlength=self.num_groups) for groups in of_ranks])
        own, at, here = torch.unique_consecutive(of_ranks[over.index], return_inverse=True, return_counts=True)
        parted = ((counts > 0).sum(0) > 1).nonzero().flatten()
        mine = torch.isin(own, parted)
        self._at, self._here = at.tolist(), here.tolist()  # of each channel, its group among those here; their channels
        self._parted = mine.nonzero().flatten().tolist()  # of those here, the ones of which others have a part
        self._places = torch.searchsorted(parted, own[mine]).tolist()  # where these stand among all such
        self._counts: list[list[int]] = counts[:, parted].tolist()  # [ranks, groups in parts], channels

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Ones and zeros, as torch's."""
        with torch.no_grad():
            if self.weight is not None and self.bias is not None:
                self.weight.fill_(1)
                self.bias.zero_()

    @told
    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [n, channels of this rank, ...] → the same."""
        if x.dim() < 2 or x.shape[1] != len(self._at):
            raise ShapeError(
                f"GroupNorm: x has local shape {tuple(x.shape)}, but its dim 1 is the {len(self._at)} of "
                f"{self.num_channels} channels that this rank has"
            )
        refuse_exact_on(self.mesh, self.parallel.axes, "GroupNorm", "use sg.LayerNorm or sg.RMSNorm")
        parameters = [each for each in (self.weight, self.bias) if each is not None]
        rows = [] if self.data is None else [self.data.axis]
        weight, bias = weight_and_bias(for_rows(parameters, list(self._shardings.values()), rows))
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype if weight is None else torch.promote_types(dtype, weight.dtype))
        if self._counts[0]:
            wide = self._in_parts(wide)
        elif self._at:
            return F.group_norm(wide, len(self._here), weight, bias, self.eps).to(x.dtype)
        else:  # no element, and as many derivatives as on the other ranks
            wide = wide * wide
        if weight is not None and bias is not None:
            shape = (-1, *(1,) * (x.dim() - 2))
            wide = wide * weight.view(shape) + bias.view(shape)
        return wide.to(x.dtype)

    def _in_parts(self, x: Tensor) -> Tensor:
        """The groups of x normalized, some with what other ranks have of them."""
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)  # [n, channels, elements]
        rows, elements = flat.shape[0], flat.shape[2]
        at, parted, places = (torch.tensor(i, device=x.device) for i in (self._at, self._parted, self._places))
        at, parted, places = at.long(), parted.long(), places.long()  # of no channels, they would be floats
        count = flat.new_tensor(self._here) * elements
        zeros = flat.new_zeros(rows, len(self._here))
        mean = zeros.index_add(1, at, flat.sum(2)) / count
        squares = zeros.index_add(1, at, (flat - mean[:, at, None]).square().sum(2))
        variance = squares / count
        # A rank that has no part of any takes part, in backward too.
        stats = flat.new_zeros(2, rows, len(self._counts[0]))
        stats = stats.index_copy(2, places, torch.stack((mean, squares)).index_select(2, parted))
        every = all_gather(stats.unsqueeze(0), self.mesh, self.axis, 0, size=len(self._counts))
        counts = flat.new_tensor(self._counts).unsqueeze(1) * elements  # [ranks, 1, groups in parts]
        means, variances = together(counts, *every.unbind(1))
        mean = mean.index_copy(1, parted, means.index_select(1, places))
        variance = variance.index_copy(1, parted, variances.index_select(1, places))
        return ((flat - mean[:, at, None]) * torch.rsqrt(variance + self.eps)[:, at, None]).view(x.shape)

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[Collective]:
        """Every collective of this rank's forward and backward for a global x of `shape` [n, channels, ...]."""
        mesh_view, own = view(self.mesh), None if self.weight is None else self.weight.dtype
        axes = [] if self.data is None else [self.data.axis]
        rows = slab(shape[0], axes, mesh_view.shape, mesh_view.coordinate)[1]
        wide = max((each for each in (own, dtype, "float32") if each is not None), key=itemsize)
        sent, ranks = 2 * rows * len(self._counts[0]), mesh_view.shape[self.axis]
        return [
            *one(self.mesh, "forward", "all-gather", "norm: moments of groups", self.axis, sent, wide),
            *one(self.mesh, "dX", "reduce-scatter", "norm: d moments of groups", self.axis, ranks * sent, wide),
            *for_rows_collectives("dW and db", list(self._shardings.values()), axes, own),
        ]

    def extra_repr(self) -> str:
        parts = f", {len(self._counts[0])} groups in parts" if self._counts[0] else ""
        return f"{self.num_groups}, {self.num_channels}, affine={self.weight is not None}, {self._flags()}{parts}"
