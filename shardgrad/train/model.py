"""A GPT, tensor, sequence and data parallel: the residual stream is sharded along sequence and batch everywhere."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from shardgrad.nn.attention import Attention
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.linear import ColumnParallelLinear
from shardgrad.nn.mlp import MLP
from shardgrad.nn.norm import LayerNorm
from shardgrad.nn.parallel import Parallel, Where
from shardgrad.nn.positions import LearnedPositions
from shardgrad.train.decoder import Block, Decoder, Recompute

MLP_RATIO = 4  # hidden features of the feed-forward block, in d_model


class GPT(Decoder):
    """A pre-norm GPT with learned positions and GELU, its vocabulary, heads and hidden features sharded over an axis.

    Args:
        layers, heads, d_model: of the transformer; heads must divide d_model. Nothing needs to divide by the ranks.
        kv_heads: heads of keys and values, which divide heads; None: as many.
        d_ff: hidden features of the feed-forward block; None: 4 d_model.
        seq_len: the longest sequence, the number of positions.
        tied: whether the head multiplies by the embedding's table.
        norm_eps: added to the variance in norms.
        vocab, dropout, compute_dtype, recompute, sequence_parallel: as of `Decoder`.
        parallel, or mesh, axis, data, reduce_dtype, device, dtype: as of `sg.Parallel`.

    Initial values are GPT-2's (see `Decoder.reset_parameters`), drawn by counter: the same on any mesh after the same
    torch.manual_seed.

    Source: Radford et al. 2019 (GPT-2); the shards: Korthikanti et al. 2022, arXiv 2205.05198.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        d_model: int,
        seq_len: int,
        vocab: int,
        kv_heads: int | None = None,
        d_ff: int | None = None,
        tied: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        recompute: Recompute = "none",
        sequence_parallel: bool = True,
        **where: Unpack[Where],
    ) -> None:
        parallel = Parallel.of("GPT", where, Where)
        super().__init__(parallel, seq_len, vocab, d_model, dropout, compute_dtype, recompute, sequence_parallel)
        parallel = self.parallel
        hidden = MLP_RATIO * d_model if d_ff is None else d_ff

        def block() -> Block:
            return Block(
                LayerNorm(d_model, norm_eps, parallel=parallel),
                Attention(d_model, heads, num_kv_heads=kv_heads, parallel=parallel),
                LayerNorm(d_model, norm_eps, parallel=parallel),
                MLP(d_model, hidden, parallel=parallel),
            )

        self.embedding = VocabParallelEmbedding(vocab, d_model, parallel=parallel)
        self.positions = LearnedPositions(seq_len, d_model, parallel=parallel)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = LayerNorm(d_model, norm_eps, parallel=parallel)
        self.head = ColumnParallelLinear(d_model, vocab, bias=False, parallel=parallel)
        if tied:
            self.head.weight = self.embedding.weight
        self.reset_parameters()
