"""What decoders have in common: the way from ids to the loss, in shards along sequence, batch and vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod, sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardgrad.comm.adjoint import gather_replicated
from shardgrad.comm.mesh import view
from shardgrad.comm.pieces import pieces_here
from shardgrad.errors import ShapeError
from shardgrad.nn import init
from shardgrad.nn.dropout import Dropout
from shardgrad.nn.linear import ColumnParallelLinear
from shardgrad.nn.linear_loss import linear_cross_entropy, tokens_of_chunk
from shardgrad.nn.loss import vocab_parallel_cross_entropy
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel
from shardgrad.nn.positions import LearnedPositions
from shardgrad.train.language_model import LanguageModel

Recompute = Literal["none", "full", "attention"]


def _nothing(x: Tensor) -> Tensor:
    return x


class Block(nn.Module):
    """X + drop(Attention(norm(X))), then X + drop(MLP(norm(X))); X is [b/dp, s/tp, d] throughout,
    or [b/dp, s, d] without sequence parallelism."""

    def __init__(self, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(
        self, x: Tensor, sequence: int, recompute: Recompute = "none", drop: Callable[[Tensor], Tensor] = _nothing
    ) -> Tensor:
        normed = self.attention_norm(x)
        if recompute == "attention" and torch.is_grad_enabled():
            x = x + drop(checkpoint(self.attention, normed, sequence, use_reentrant=False))
        else:
            x = x + drop(self.attention(normed, sequence))
        return x + drop(self.mlp(self.mlp_norm(x), sequence))


class Decoder(LanguageModel):
    """Embedding, blocks, norm, head and loss. Subclasses make the parts.

    Args:
        parallel: its axis shards vocabulary, heads, hidden features, and between the products the sequence; its `data`
            the batch. As of layers, but sequence_dim, which is 1, need not be said.
        seq_len: the longest sequence.
        vocab: the number of token ids.
        width: of the residual stream.
        compute_dtype: of products and activations, by torch.autocast; None: that of the parameters. In bfloat16 the
            parameters, their gradients and so the optimizer's state stay float32: these are the master weights.
        recompute: what backward computes again rather than keeps: "full", each block but its input; "attention", the
            attention layers, whose queries, keys and values are much of what a block keeps.
        dropout: the probability with which, in training, an element is zeroed of the embedded ids and of what attention
            and feed-forward add to the residual stream; by `Dropout`, so that masks do not depend on the mesh.
        sequence_parallel: whether the axis shards the sequence between the products; if not, every rank of the axis
            holds the residual stream whole.
        stream: how the residual stream is stored; None: X[b/dp,s/tp,d], with the axes' own names.

    fused_loss: whether `loss` has the head's product and the cross-entropy in one, its gradients made in forward; None:
    where the logits that a rank has of a micro-batch are several chunks.
    """

    fused_loss: bool | None = None

    embedding: nn.Module
    positions: LearnedPositions | None
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        parallel: Parallel,
        seq_len: int,
        vocab: int,
        width: int,
        dropout: float,
        compute_dtype: torch.dtype | None,
        recompute: Recompute,
        sequence_parallel: bool = True,
        stream: str | None = None,
    ) -> None:
        super().__init__()
        if parallel.sequence_dim not in (None, 1):
            raise ShapeError(f"x is [b, s, d] in decoders, so sequence_dim is 1, not {parallel.sequence_dim}")
        self.parallel = parallel = replace(parallel, sequence_dim=1 if sequence_parallel else None)
        self.mesh, self.axis, self.data = parallel.mesh, parallel.axis, parallel.data
        self.seq_len, self.vocab, self.width = seq_len, vocab, width
        self.compute_dtype, self.recompute = compute_dtype, recompute
        batch = "b" if self.data is None else f"b/{self.data.axis}"
        sequence = f"s/{self.axis}" if sequence_parallel else "s"
        stream = f"X[{batch},{sequence},d]" if stream is None else stream
        self.dropout = Dropout(dropout, stream, mesh=self.mesh)

    def forward(self, ids: Tensor, batch: int | None = None, part: tuple[int, int] | None = None) -> Tensor:
        """Logits of the next token: ids [b/dp, s], alike on every rank of the axis → [b/dp, s, v/tp].

        batch: b. With dropout over several ranks of dp, they exchange it where it is not given.
        part: where in a batch that has micro-batches this one begins, and its size: for dropout, as of `Dropout`.

        Raises:
            ShapeError: ids are not [b, s] with s of at most seq_len.
        """
        with self._computing(ids):
            return self.head(self._stream(ids, batch, part), ids.shape[1])

    def _computing(self, ids: Tensor) -> torch.autocast:
        return torch.autocast(ids.device.type, self.compute_dtype, enabled=self.compute_dtype is not None)

    def _stream(self, ids: Tensor, batch: int | None, part: tuple[int, int] | None) -> Tensor:
        """What the head multiplies: X[b/dp,s/tp,d], normed. Arguments as of a call."""
        if ids.dim() != 2 or ids.shape[1] > self.seq_len:
            raise ShapeError(
                f"ids must be [b, s] with at most {self.seq_len} positions (seq_len), got {tuple(ids.shape)}"
            )
        sequence = ids.shape[1]
        sizes = {"s": sequence, "d": self.width} | ({} if batch is None else {"b": batch})
        drop = partial(self.dropout, sizes=sizes, part=None if part is None else {"b": part})
        x = self.embedding(ids)
        if self.positions is not None:
            x = self.positions.add_to(x, sequence)
        x = drop(x)
        for block in self.blocks:
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(block, x, sequence, drop=drop, use_reentrant=False)
            else:
                x = block(x, sequence, self.recompute, drop)
        normed: Tensor = self.norm(x)
        return normed

    def loss(self, ids: Tensor, targets: Tensor, batch: int | None = None) -> Tensor:
        return self._loss(ids, targets, "mean", batch)

    def loss_sum(self, ids: Tensor, targets: Tensor, batch: int, part: tuple[int, int]) -> Tensor:
        """The sum of the losses of a micro-batch's tokens; otherwise as `loss`. part: as of a call."""
        return self._loss(ids, targets, "sum", batch, part)

    def fuses(self, tokens: int) -> bool:
        """Whether the loss of so many tokens of a rank is fused with the head's product."""
        if self.fused_loss is not None or not isinstance(self.head, ColumnParallelLinear):
            return bool(self.fused_loss)
        if torch.compiler.is_compiling():  # where it would break the graph
            return False
        here = view(self.mesh)
        pieces = prod(pieces_here(here, axis) for axis in self.token_axes)  # in exact mode: alike whatever the ranks
        return tokens // pieces > tokens_of_chunk(self.vocab, here, self.axis)

    def _loss(
        self,
        ids: Tensor,
        targets: Tensor,
        reduction: Literal["mean", "sum"],
        batch: int | None,
        part: tuple[int, int] | None = None,
    ) -> Tensor:
        if self.fuses(targets.numel()):
            head: Any = self.head
            with self._computing(ids):
                return linear_cross_entropy(
                    self._stream(ids, batch, part),
                    head.weight,
                    targets,
                    head.layout(3),
                    self.mesh,
                    vocab_size=self.vocab,
                    reduction=reduction,
                    grads="forward",
                    reduce_dtype=head.reduce_dtype,
                )
        return vocab_parallel_cross_entropy(
            self(ids, batch, part),
            targets,
            vocab_size=self.vocab,
            mesh=self.mesh,
            axis=self.axis,
            token_axes=self.token_axes,
            reduction=reduction,
        )

    def next_logits(self, ids: Tensor, at: int) -> Tensor:
        here = prod(pieces_here(view(self.mesh), axis) for axis in self.token_axes)  # in exact mode, one for each piece
        logits = self(ids.expand(here, -1))[:1, at]
        return gather_replicated(logits, self.mesh, self.axis, dim=1, size=self.vocab)[0]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's initial values: normal, 0.02; the projections into the residual stream divided by √(2·layers); biases
        zero. Norms keep their ones and zeros."""
        residual = 0.02 / sqrt(2 * len(self.blocks))
        filled: set[int] = set()
        for path, owner in self.named_modules():
            if not isinstance(owner, ShardedModule) or path.endswith("norm"):
                continue
            for name in owner.shardings():
                parameter = owner.get_parameter(name)
                if id(parameter) in filled:  # tied to another, which has drawn its values
                    continue
                filled.add(id(parameter))
                if name.endswith("bias"):
                    with torch.no_grad():
                        parameter.zero_()
                else:
                    into_residual = f"{path}.{name}".replace("_", ".").endswith(("output.weight", "down.weight"))
                    owner.fill(name, partial(init.normal, residual if into_residual else 0.02), generator)
