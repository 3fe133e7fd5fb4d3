"""A Llama style decoder in a 3D layout: every product is sharded over three axes, and no weight is replicated.

The axes are called as AxoNN calls them: z splits the batch and stores weights, x splits the features of the residual
stream, y splits heads and hidden features. Between products the residual stream is X[b/z,s/y,d/x], one part a rank
(scatter: reduce-scatter):

    query, key, value   X[b/z,s/y,d/x] W[h/y,k,d/x/z] -> Q[b/z,s,h/y/x,k]    gather X on y, W on z; scatter Q on x
    output              A[b/z,s,h/y/x,k] W[m/x/z,h/y,k] -> Y[b/z,s/y,m/x]    gather A on x, W on z; scatter Y on y
    gate, up            X[b/z,s/y,d/x] W[f/y,d/x/z] -> G[b/z,s/x,f/y]        as query
    down                H[b/z,s/x,f/y] W[m/x/z,f/y] -> Y[b/z,s/y,m/x]        as output
    head                X[b/z,s/y,d/x] W[v/y,d/x/z] -> L[b/z,s,v/y]          gather X on y, W on z; all-reduce L on x

Two borders are no 3D products: the embedding looks up whole rows (its table is sharded over y and z, replicated over x)
of which each rank keeps its features, and a norm sums squares over x.

Source: Agarwal et al. 1995 (the 3D product); Singh et al. 2024, arXiv 2305.13525 (AxoNN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.comm.adjoint import slice_replicated
from shardgrad.comm.mesh import view
from shardgrad.layout.batch_axis import BatchAxis
from shardgrad.layout.cost import Collective
from shardgrad.layout.sizes import chunk
from shardgrad.nn.by_layout import Linear
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.feature_pieces import ShardedFeatures, norm_of_features, norm_of_features_collectives
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import OnMesh, Parallel
from shardgrad.nn.pieces import in_pieces, row_pieces, row_pieces_collectives
from shardgrad.nn.rotary import Rotary
from shardgrad.nn.sharded_norm import SquaresNorm
from shardgrad.nn.transfer import transfer
from shardgrad.train.decoder import Block, Decoder, Recompute
from shardgrad.train.llama import hidden_features

AXES = ("z", "x", "y")
_STREAM = "X[b/z,s/y,d/x]"
_ROWS = ((0, ("z",)), (1, ("y",)))  # of the stream


class Grid(Decoder):
    """`shardgrad.train.llama.Llama`, every head with keys and values of its own, on a mesh with the axes z, x and y.

    Arguments as of `Llama`.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        d_model: int,
        seq_len: int,
        vocab: int,
        d_ff: int | None = None,
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        recompute: Recompute = "none",
        **where: Unpack[OnMesh],
    ) -> None:
        parallel = Parallel.of("Grid", where, OnMesh)
        parallel = replace(parallel, axis="y", data=BatchAxis("z", shard_params=True))
        super().__init__(parallel, seq_len, vocab, d_model, dropout, compute_dtype, recompute, stream=_STREAM)
        parallel = self.parallel
        linear = partial(Linear, bias=False, parallel=parallel)
        hidden = hidden_features(d_model) if d_ff is None else d_ff
        norm = partial(FeatureNorm, d_model, norm_eps, parallel)
        rotary = Rotary(d_model // heads, rope_theta)

        def block() -> Block:
            return Block(
                norm(), GridAttention(d_model, heads, rotary, linear), norm(), GridMLP(d_model, hidden, linear)
            )

        self.embedding = FeatureEmbedding(vocab, d_model, parallel=parallel)
        self.positions = None
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = norm()
        self.head = GridHead(d_model, vocab, linear)
        self.reset_parameters()


class _OfLinears(nn.Module):
    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[Collective]:
        """Every collective of this rank's forward and backward for x of a global shape."""
        rows = {"b": shape[0], "s": shape[1]}
        return [row for layer in self.children() if isinstance(layer, Linear) for row in layer.collectives(rows, dtype)]


class GridAttention(_OfLinears):
    """Causal self-attention, each rank with its own heads, sharded over y and then x: x and y are X[b/z,s/y,d/x]."""

    def __init__(self, d_model: int, heads: int, rotary: Rotary, linear: partial[Linear]) -> None:
        super().__init__()
        self.rotary = rotary
        sizes = {"h": heads, "k": d_model // heads}
        for name in ("query", "key", "value"):
            layout = f"{_STREAM} W[h/y,k,d/x/z] -> Q[b/z,s,h/y/x,k]"
            self.add_module(name, linear(d_model, d_model, layout=layout, sizes=sizes))
        self.output = linear(d_model, d_model, layout="A[b/z,s,h/y/x,k] W[m/x/z,h/y,k] -> Y[b/z,s/y,m/x]", sizes=sizes)

    def forward(self, x: Tensor, sequence: int) -> Tensor:
        q, k, v = (self.get_submodule(name)(x, {"s": sequence}) for name in ("query", "key", "value"))
        positions = torch.arange(sequence, device=x.device)
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        a = in_pieces(_attend, self.output.mesh, [(0, ["z"]), (2, ["y", "x"])], q, k, v)
        return self.output(a, {"s": sequence})


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of some heads, [b, s, h, k] each."""
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class GridMLP(_OfLinears):
    """SwiGLU: x and y are X[b/z,s/y,d/x]."""

    def __init__(self, d_model: int, hidden: int, linear: partial[Linear]) -> None:
        super().__init__()
        self.gate = linear(d_model, hidden, layout=f"{_STREAM} W[f/y,d/x/z] -> G[b/z,s/x,f/y]")
        self.up = linear(d_model, hidden, layout=f"{_STREAM} W[f/y,d/x/z] -> U[b/z,s/x,f/y]")
        self.down = linear(hidden, d_model, layout="H[b/z,s/x,f/y] W[m/x/z,f/y] -> Y[b/z,s/y,m/x]")

    def forward(self, x: Tensor, sequence: int) -> Tensor:
        known = {"s": sequence}
        gate = in_pieces(F.silu, self.gate.mesh, [(0, ["z"]), (1, ["x"]), (2, ["y"])], self.gate(x, known))
        return self.down(gate * self.up(x, known), known)


class GridHead(Linear):
    """X[b/z,s/y,d/x] → the logits [b/z,s,v/y], alike on every rank of x."""

    def __init__(self, d_model: int, vocab: int, linear: partial[Linear]) -> None:
        layout = f"{_STREAM} W[v/y,d/x/z] -> L[b/z,s,v/y]"
        super().__init__(d_model, vocab, layout=layout, **linear.keywords)

    def forward(self, x: Tensor, sequence: int) -> Tensor:  # type: ignore[override]
        return super().forward(x, {"s": sequence})

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[Collective]:  # type: ignore[override]
        return super().collectives({"b": shape[0], "s": shape[1]}, dtype)


class FeatureEmbedding(VocabParallelEmbedding):
    """The lookup [b/z,s/y,m], of which each rank of x keeps its features: → [b/z,s/y,m/x]."""

    def forward(self, ids: Tensor) -> Tensor:
        return slice_replicated(super().forward(ids), self.mesh, "x", 2)

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[Collective]:
        sizes = self.resolve(dict(zip("bsm", (*shape, self.embedding_dim))))
        own = transfer("dW", "dY", "Y[b/z,s/y,m/x]", "Y[b/z,s/y,m]", sizes, dtype)
        return [*super().collectives(shape, dtype), *own]


class FeatureNorm(ShardedModule):
    """RMSNorm of X[b/z,s/y,d/x] with a weight W[d/x]: the squares of a row are summed over x, and so is the gradient of
    that sum, which each rank uses for its own features."""

    weight: Tensor

    def __init__(self, features: int, eps: float, parallel: Parallel) -> None:
        super().__init__(parallel.mesh, AXES)
        self.features, self.eps = features, eps
        self._sharded = ShardedFeatures.of([features], 0, view(self.mesh).axis("x"))
        self.declare("weight", "W[d/x]", {"d": features}, parallel.device, parallel.dtype)
        with torch.no_grad():
            self.weight.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        used = row_pieces([self.weight], [self._shardings["weight"]], self.mesh, _ROWS)
        norm = SquaresNorm(self.features, self.eps)
        return norm_of_features(norm, x, used, _ROWS, self._sharded, self.mesh, "x")

    def collectives(self, shape: Sequence[int], dtype: Any = None) -> list[Collective]:
        sharding, coordinate = self._shardings["weight"], view(self.mesh)
        own: Any = self.weight.dtype
        rows = 1
        for size, axis in zip(shape, ("z", "y")):
            rows *= chunk(size, coordinate.shape[axis], coordinate.coordinate[axis])[1]
        return [
            *row_pieces_collectives("dW", [sharding], self.mesh, _ROWS, own),
            *norm_of_features_collectives("rms", rows, own, self.mesh, "x"),
        ]
