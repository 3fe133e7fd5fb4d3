"""Cross-entropy of logits whose vocabulary is sharded over an axis; the whole vocabulary never exists on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm import shim
from shardgrad.comm.adjoint import all_reduce
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import axis_on, view
from shardgrad.comm.pieces import level_of, pieces_here, reduce_pieces_collectives
from shardgrad.errors import ShapeError
from shardgrad.layout.cost import Collective, itemsize, sent
from shardgrad.nn.exact_loss import sum_of_tokens
from shardgrad.nn.pieces import is_exact
from shardgrad.nn.token_statistics import statistics
from shardgrad.nn.token_sums import Asked, statistics_collectives
from shardgrad.nn.vocabulary import Vocabulary, masked


@told
def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_size: int,
    mesh: DeviceMesh,
    axis: str = "tp",
    token_axes: str | Sequence[str] = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """F.cross_entropy over a vocabulary that is sharded over an axis, in fp32 for 16-bit logits.

    Communicates three numbers a token: the maximum, the sum of exponentials, and the target's logit (four with label
    smoothing). The logits are read, never written. The loss and each token's loss are alike on every rank of the axis.

    Args:
        logits: [..., vocab_size / ranks], this rank's part, as the axis shards (torch.chunk, or `set_balanced`).
        target: [...] of ids of the whole vocabulary, alike on every rank of the axis.
        vocab_size: the global vocabulary.
        mesh, axis: the axis of the mesh that shards the vocabulary.
        token_axes: axes over which ranks hold different tokens (data parallel): `mean` divides by the tokens of all of
            them, and `mean` and `sum` are those of all tokens, on every rank. Call backward on every rank, once.
        ignore_index, label_smoothing, reduction: as of F.cross_entropy; smoothing is over the global vocabulary.

    In exact mode (`sg.set_exact`) the token axes shard the first dim, and its pieces are summed in the tree.

    Raises:
        ShapeError: logits that are whole already, or otherwise do not fit `vocab_size`, or target does not fit logits.
        IndexError: a target is outside the vocabulary.
        ValueError: an unknown reduction, or label smoothing outside [0, 1].
    Source: Shoeybi et al. 2019, arXiv 1909.08053, section 3.
    """
    token_axes = (token_axes,) if isinstance(token_axes, str) else token_axes
    over = axis_on(mesh, axis, "vocab_parallel_cross_entropy")
    tokens_over = [axis_on(mesh, name, "vocab_parallel_cross_entropy") for name in token_axes]
    if over in tokens_over:
        raise ShapeError(
            f"axis {axis!r} shards the vocabulary; it cannot be one of token_axes={tuple(token_axes)} as well"
        )
    vocabulary = Vocabulary(vocab_size, over)
    _check(logits, target, vocabulary, label_smoothing, reduction)
    ignored = target == ignore_index
    asked = Asked(vocabulary, mean=label_smoothing > 0)
    blocks = 1 if torch.compiler.is_compiling() else prod(pieces_here(view(mesh), name) for name in token_axes)
    values = statistics(logits, asked, masked(target, ignore_index).unsqueeze(-1), blocks=blocks)
    assert values.log_prob is not None
    losses = -values.log_prob.squeeze(-1)
    if values.mean_log_prob is not None:
        losses = (1 - label_smoothing) * losses - label_smoothing * values.mean_log_prob
    losses = losses.masked_fill(ignored, 0)
    if reduction == "none":
        return losses
    if is_exact(mesh):
        total = sum_of_tokens(losses, mesh, token_axes)
    else:
        total = losses.sum()
        for name in token_axes:
            total = all_reduce(total, mesh, name)
    if reduction == "sum":
        return total
    count = (~ignored).sum().to(losses.dtype)
    for name, token_axis in zip(token_axes, tokens_over):
        if torch.compiler.is_compiling() or shim.beyond_backward():
            count = all_reduce(count, mesh, name)
        elif token_axis.size > 1:
            count = AllReduce(token_axis, "all-reduce of the number of tokens")(count)
    return total / count


def cross_entropy_collectives(
    tokens: int,
    dtype: Any,
    *,
    mesh: DeviceMesh,
    axis: str = "tp",
    token_axes: str | Sequence[str] = (),
    reduction: Literal["mean", "sum"] = "mean",
) -> list[Collective]:
    """Every collective of `vocab_parallel_cross_entropy`, without smoothing, over this rank's `tokens` and those of
    `token_axes`; its backward has none.

    Args:
        tokens: on this rank.
        dtype: of the logits.
    """
    mesh_view = view(mesh)
    width = max(itemsize(dtype), itemsize("float32"))
    names = (token_axes,) if isinstance(token_axes, str) else tuple(token_axes)
    found = statistics_collectives(tokens, dtype, mesh=mesh, axis=axis, chosen=1, what="loss")
    sums = ["number of tokens"] if reduction == "mean" else []
    if is_exact(mesh):
        levels = [level_of(mesh_view, *reversed(names))] if names else []
        found += reduce_pieces_collectives("forward", "loss: total", 1, width, levels, mesh_view)
    else:
        sums.append("total")
    for name, what in product(names, sums):
        over = mesh_view.axis(name)
        if over.size > 1:
            count = sent("all-reduce", 1, over.size, over.index) * width
            found.append(Collective("forward", "all-reduce", f"loss: {what}", name, count))
    return found


def _check(logits: Tensor, target: Tensor, vocabulary: Vocabulary, label_smoothing: float, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie between 0 and 1, not {label_smoothing}")
    vocabulary.check(logits)
    if target.shape != logits.shape[:-1]:
        raise ShapeError(
            f"target has shape {tuple(target.shape)}, logits {tuple(logits.shape)}: expected {tuple(logits.shape[:-1])}"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"target must hold integer ids, got {target.dtype}")
