"""Convolutions whose channels, groups or batch are sharded over an axis: torch's layers, five layouts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, Unpack

from torch import Tensor

from shardgrad.comm.mesh import view
from shardgrad.errors import ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.layout.sizes import Sizes, slab
from shardgrad.nn.layer import OneProduct
from shardgrad.nn.parallel import OnAxis
from shardgrad.ops.convolve import Convolution, Numbers, numbers

ShardDim = Literal["out", "in", "groups", "batch", "sharded"]

# {t}: the axis. {g}, {gt}: the groups where there are several, as they are and sharded. {x}, {k}, {y}: spatial letters.
_LAYOUTS: dict[str, str] = {
    "out": "X[b,{g}c,{x}] W[{g}o/{t},c,{k}] -> Y[b,{g}o/{t},{y}] + B[{g}o/{t}]",
    "in": "X[b,{g}c/{t},{x}] W[{g}o,c/{t},{k}] -> Y[b,{g}o,{y}] + B[{g}o]",
    "groups": "X[b,{gt}c,{x}] W[{gt}o,c,{k}] -> Y[b,{gt}o,{y}] + B[{gt}o]",
    "batch": "X[b/{t},{g}c,{x}] W[{g}o,c,{k}] -> Y[b/{t},{g}o,{y}] + B[{g}o]",
    "sharded": "X[b/{t},{g}c,{x}] W[{g}o/{t},c,{k}] -> Y[b/{t},{g}o,{y}] + B[{g}o/{t}]",
}
_SPATIAL = {1: ("h", "i", "p"), 2: ("h,w", "i,j", "p,q")}


class _Conv(OneProduct):
    _spatial: int
    takes = OnAxis

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: Numbers = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        shard_dim: ShardDim = "out",
        **where: Unpack[OnAxis],
    ) -> None:
        super().__init__(where)
        user, n = type(self).__name__, self._spatial
        if shard_dim not in _LAYOUTS:
            raise ShapeError(f"{user}: shard_dim is one of {', '.join(_LAYOUTS)}, not {shard_dim!r}")
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise ShapeError(
                f"{user}: groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}, all "
                "at least 1"
            )
        if shard_dim == "groups" and groups == 1:
            raise ShapeError(
                f"{user}: shard_dim='groups' of one group leaves one rank all the work: shard_dim='out' or 'in'"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.shard_dim = shard_dim
        self.kernel_size = numbers("kernel_size", kernel_size, n, 1)
        many = groups > 1
        x, k, y = _SPATIAL[n]
        text = _LAYOUTS[shard_dim].format(t=self.axis, g="g," if many else "", gt=f"g/{self.axis},", x=x, k=k, y=y)
        self.layout = Layout(text if bias else text.partition(" + ")[0], spatial=n)
        self.operation = Convolution.of(self.layout, stride, padding, dilation)
        sizes = {
            **({"g": groups} if many else {}),
            "c": in_channels // groups,
            "o": out_channels // groups,
            **dict(zip(k.split(","), self.kernel_size)),
        }
        # torch's channel dim of this rank's x is g·c: as many groups, of as many channels.
        shape, here = view(self.mesh).shape, view(self.mesh).coordinate
        first = self.layout.lhs
        self._channels = [slab(sizes[at], first.axes_of(at), shape, here)[1] for at in ("g", "c")] if many else []
        self.wraps = many
        torchs = {"weight": (out_channels, in_channels // groups, *self.kernel_size), "bias": (out_channels,)}
        self.build(
            sizes,
            bias=bias,
            products={"": self.layout},
            operation=self.operation,
            merged=torchs if many else None,
        )

    def enter(self, x: Tensor) -> Tensor:
        if x.dim() != self._spatial + 2 or x.shape[1] != prod(self._channels):
            factors = " · ".join(map(str, self._channels))
            raise ShapeError(
                f"{type(self).__name__}: x has local shape {tuple(x.shape)}, but {self.layout.lhs} of {self.groups} "
                f"groups of {self._sizes['c']} channels leaves this rank {factors} = {prod(self._channels)} channels "
                f"in dim 1 of {self._spatial + 2}: shard x at the borders of groups, "
                "sg.shard(full.unflatten(1, (groups, -1)), layer.layout['X'], mesh).flatten(1, 2)"
            )
        return x.unflatten(1, self._channels)

    def leave(self, y: Tensor) -> Tensor:
        return y.flatten(1, 2)

    def global_sizes(self, shape: Sequence[int]) -> Sizes:
        """Of every letter, for x of a global shape as torch has it, [b, in_channels, …].

        Raises:
            ShapeError: x has other channels, or another number of dims.
        """
        if len(shape) != self._spatial + 2 or shape[1] != self.in_channels:
            raise ShapeError(f"x has global shape [b, {self.in_channels}, …], not {tuple(shape)}")
        letters = self.layout.lhs.letters
        spatial = dict(zip(letters[-self._spatial :], shape[2:]))
        sizes = self.resolve({**self._sizes, letters[0]: shape[0], **spatial})
        self.operation.derive(self.layout, sizes)
        return sizes

    def extra_repr(self) -> str:
        s = self.operation
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={s.stride}, "
            f"padding={s.padding}, dilation={s.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"{self._flags()}, shard_dim={self.shard_dim!r}"
        )


_DOC = """nn.Conv{n}d with its channels, its groups or its batch sharded over an axis.

    | shard_dim   | layout (without groups)                          | forward      | dX         | dW, db         |
    | ----------- | ------------------------------------------------ | ------------ | ---------- | -------------- |
    | `"out"`     | `X[b,c,…] W[o/tp,c,…] -> Y[b,o/tp,…] + B[o/tp]`  | –            | all-reduce | –              |
    | `"in"`      | `X[b,c/tp,…] W[o,c/tp,…] -> Y[b,o,…] + B[o]`     | all-reduce Y | –          | –              |
    | `"groups"`  | `X[b,g/tp,c,…] W[g/tp,o,c,…] -> Y[b,g/tp,o,…]`   | –            | –          | –              |
    | `"batch"`   | `X[b/tp,c,…] W[o,c,…] -> Y[b/tp,o,…] + B[o]`     | –            | –          | all-reduce     |
    | `"sharded"` | `X[b/tp,c,…] W[o/tp,c,…] -> Y[b/tp,o,…]`         | all-gather W | the same   | reduce-scatter |

    `"out"` and then `"in"` is a pair with one all-reduce forward and one backward; a depthwise layer between them takes
    `"groups"`, and communicates nothing. With groups > 1 a group is a letter of its own (`layer.layout` says all):
    `"groups"` gives each rank whole groups, the others shard inside every group, so the local channels are g·(o/tp).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of nn.Conv{n}d; global
            sizes, none of which need divide by the ranks. Padding is by zeros, and in numbers.
        shard_dim: what the axis shards.
        parallel, or mesh, axis, device, dtype: as of `Parallel`.

    Shapes: x [b, in_channels, …] → [b, out_channels, …], sharded as `layer.layout` says, channels of groups merged as
    torch has them. The parameters are torch's own, [out_channels, in_channels / groups, …].

    Raises:
        ShapeError: groups do not divide the channels, or a setting is out of range.
    """


class Conv1d(_Conv):
    __doc__ = _DOC.format(n=1)
    _spatial = 1


class Conv2d(_Conv):
    __doc__ = _DOC.format(n=2)
    _spatial = 2
