"""A GPT, tensor and sequence parallel over one axis: the residual stream is cut along the sequence everywhere."""

from __future__ import annotations

from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.errors import ShapeError
from shardgrad.nn import init
from shardgrad.nn.attention import Attention
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.linear import ColumnParallelLinear
from shardgrad.nn.loss import vocab_parallel_cross_entropy
from shardgrad.nn.mlp import MLP
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.norm import LayerNorm
from shardgrad.nn.positions import LearnedPositions

MLP_RATIO = 4  # hidden features of the feed-forward block, in d_model


class Block(nn.Module):
    """X + Attention(norm(X)), then X + MLP(norm(X)); X is [b, s/tp, d] throughout."""

    def __init__(self, d_model: int, heads: int, *, mesh: DeviceMesh, axis: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(d_model, mesh=mesh, axis=axis, sequence_dim=1, dtype=dtype)
        self.attention = Attention(d_model, heads, mesh=mesh, axis=axis, sequence_dim=1, dtype=dtype)
        self.mlp_norm = LayerNorm(d_model, mesh=mesh, axis=axis, sequence_dim=1, dtype=dtype)
        self.mlp = MLP(d_model, MLP_RATIO * d_model, mesh=mesh, axis=axis, sequence_dim=1, dtype=dtype)

    def forward(self, x: Tensor, sequence: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), sequence)
        return x + self.mlp(self.mlp_norm(x), sequence)


class GPT(nn.Module):
    """A pre-norm GPT with learned positions and GELU, its vocabulary, heads and hidden features cut over an axis.

    Args:
        layers, heads, d_model: of the transformer; heads must divide d_model. Nothing needs to divide by the ranks.
        seq_len: the longest sequence, the number of positions.
        vocab: the number of token ids.
        mesh, axis: the axis of the mesh that everything is cut over.
        dtype: of the parameters and of all that is computed.

    Initial values are GPT-2's (normal, 0.02; the projections into the residual stream divided by √(2·layers); biases
    zero), drawn by counter: the same on any mesh after the same torch.manual_seed.

    Source: Radford et al. 2019 (GPT-2); the cuts: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        d_model: int,
        seq_len: int,
        vocab: int,
        mesh: DeviceMesh,
        axis: str = "tp",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.seq_len, self.vocab, self.mesh, self.axis = layers, seq_len, vocab, mesh, axis
        self.embedding = VocabParallelEmbedding(vocab, d_model, mesh=mesh, axis=axis, sequence_dim=1, dtype=dtype)
        self.positions = LearnedPositions(seq_len, d_model, mesh=mesh, axis=axis, sequence_dim=1, dtype=dtype)
        self.blocks = nn.ModuleList(Block(d_model, heads, mesh=mesh, axis=axis, dtype=dtype) for _ in range(layers))
        self.norm = LayerNorm(d_model, mesh=mesh, axis=axis, sequence_dim=1, dtype=dtype)
        self.head = ColumnParallelLinear(d_model, vocab, bias=False, mesh=mesh, axis=axis, sequence_dim=1, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's initial values; norms keep their ones and zeros."""
        residual = 0.02 / sqrt(2 * self.layers)
        for path, owner in self.named_modules():
            if not isinstance(owner, ShardedModule) or isinstance(owner, LayerNorm):
                continue
            for name in owner.stored():
                if name.endswith("bias"):
                    with torch.no_grad():
                        owner.get_parameter(name).zero_()
                else:
                    into_residual = name == "output_weight" or path.endswith("mlp.down")
                    owner.fill(name, partial(init.normal, residual if into_residual else 0.02), generator)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token: ids [b, s], alike on every rank → [b, s, v/tp].

        Raises:
            ShapeError: ids are not [b, s] with s of at most seq_len.
        """
        if ids.dim() != 2 or ids.shape[1] > self.seq_len:
            raise ShapeError(
                f"ids must be [b, s] with at most {self.seq_len} positions (seq_len), got {tuple(ids.shape)}"
            )
        sequence = ids.shape[1]
        x = self.embedding(ids) + self.positions(sequence)
        for block in self.blocks:
            x = block(x, sequence)
        return self.head(self.norm(x), sequence)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token, alike on every rank. ids, targets: [b, s]."""
        return vocab_parallel_cross_entropy(self(ids), targets, vocab_size=self.vocab, mesh=self.mesh, axis=self.axis)
