"""A Llama style decoder: RMSNorm, rotary positions, KV heads shared by query heads, SwiGLU, no biases."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from shardgrad.nn.attention import Attention
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.linear import ColumnParallelLinear
from shardgrad.nn.mlp import SwiGLU
from shardgrad.nn.norm import RMSNorm
from shardgrad.nn.parallel import Parallel, Where
from shardgrad.nn.rotary import Rotary
from shardgrad.train.decoder import Block, Decoder, Recompute


def hidden_features(d_model: int) -> int:
    """8/3 d_model, up to a multiple of 64 (of 8, if it is small): as many parameters as a GELU block of 4 d_model."""
    grain = 64 if d_model >= 192 else 8
    return grain * -(-8 * d_model // (3 * grain))


class Llama(Decoder):
    """A Llama style decoder, its vocabulary, heads and hidden features sharded over an axis.

    Args:
        d_ff: hidden features of the feed-forward block; None: `hidden_features(d_model)`.
        rope_theta: the base of the rotary frequencies.
        others: as of `GPT`. There is no table of positions; seq_len only bounds the ids.

    Source: Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; the shards: Korthikanti et al. 2022, arXiv 2205.05198.
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
        rope_theta: float = 10000.0,
        dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        recompute: Recompute = "none",
        sequence_parallel: bool = True,
        **where: Unpack[Where],
    ) -> None:
        parallel = Parallel.of("Llama", where, Where)
        super().__init__(parallel, seq_len, vocab, d_model, dropout, compute_dtype, recompute, sequence_parallel)
        parallel = self.parallel
        rotary = Rotary(d_model // heads, rope_theta)
        hidden = hidden_features(d_model) if d_ff is None else d_ff

        def block() -> Block:
            return Block(
                RMSNorm(d_model, norm_eps, parallel=parallel),
                Attention(d_model, heads, num_kv_heads=kv_heads, bias=False, rotary=rotary, parallel=parallel),
                RMSNorm(d_model, norm_eps, parallel=parallel),
                SwiGLU(d_model, hidden, parallel=parallel),
            )

        self.embedding = VocabParallelEmbedding(vocab, d_model, parallel=parallel)
        self.positions = None
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = RMSNorm(d_model, norm_eps, parallel=parallel)
        self.head = ColumnParallelLinear(d_model, vocab, bias=False, parallel=parallel)
        if tied:
            self.head.weight = self.embedding.weight
        self.reset_parameters()
