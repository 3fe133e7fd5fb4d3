"""Every collective of one training step, from layouts and sizes alone: each layer says its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from shardgrad.comm.mesh import view
from shardgrad.layout.cost import Collective
from shardgrad.layout.sizes import chunk
from shardgrad.nn.attention import Attention
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.global_ops import clip_grad_norm_collectives
from shardgrad.nn.linear_loss import linear_loss_collectives
from shardgrad.nn.loss import cross_entropy_collectives
from shardgrad.nn.partial_grads import all_reduce_partial_grads_collectives
from shardgrad.nn.pieces import is_exact
from shardgrad.ops.bound import bind
from shardgrad.ops.micro_batches import micro_batches
from shardgrad.train.decoder import Decoder


def step_collectives(
    model: Decoder, batch: int, sequence: int, *, accumulate: int = 1, clip: bool = False
) -> list[Collective]:
    """What this rank sends in the forward, backward and update of one step over ids [batch, sequence], every parameter
    trained.

    The comparisons between ranks that a layer makes when it first sees a shape are not listed.

    Args:
        batch: of the whole step, over all ranks and micro-batches.
        accumulate: micro-batches.
        clip: whether gradients are clipped.
    """
    parts = micro_batches(model.mesh, accumulate, *model.token_axes)
    each = [row for _ in parts for row in _pass(model, batch // accumulate, sequence)]
    clipping = clip_grad_norm_collectives(model) if clip else []
    return [*each, *all_reduce_partial_grads_collectives(model), *clipping]


def _pass(model: Decoder, batch: int, sequence: int) -> Iterator[Collective]:
    """Forward and backward of one micro-batch."""
    dtype = model.compute_dtype or next(model.parameters()).dtype
    tokens = batch * sequence
    for name in model.token_axes:
        axis = view(model.mesh).axis(name)
        tokens = chunk(batch, axis.size, axis.index)[1] * sequence
    fused = model.fuses(tokens)
    for path, module in _layers(model):
        if fused and module is model.head:
            rows = _of_fused_head(module, batch, sequence, model.width, dtype)
        else:
            rows = _of(module, model, batch, sequence, dtype)
        yield from (replace(row, tensor=f"{path}: {row.tensor}") for row in rows)
        again = path.startswith("blocks.") and (
            model.recompute == "full" or (model.recompute == "attention" and path.endswith(".attention"))
        )
        for row in rows if again else ():
            if row.phase == "forward":
                yield replace(row, phase="recompute", tensor=f"{path}: {row.tensor}")
    over: dict[str, Any] = {"mesh": model.mesh, "axis": model.axis, "token_axes": model.token_axes}
    over["reduction"] = "sum" if is_exact(model.mesh) else "mean"
    if fused:
        yield from linear_loss_collectives(tokens, dtype, vocab_size=model.vocab, **over)
    else:
        yield from cross_entropy_collectives(tokens, dtype, **over)


def _of_fused_head(head: Any, batch: int, sequence: int, width: int, dtype: Any) -> list[Collective]:
    """Its product's, whose gradients are made in forward: nothing is gathered again."""
    layout = head.layout(3)
    bound = bind((layout,), (False,), head.mesh, (layout.lhs.name, layout.rhs.name), head.reduce_dtype)
    return bound.collectives(head.global_sizes((batch, sequence, width)), dtype)


def _layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers that say what they send, with their names."""
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if hasattr(child, "collectives"):
            yield where, child
        else:
            yield from _layers(child, where)


def _of(layer: Any, model: Decoder, batch: int, sequence: int, dtype: Any) -> list[Collective]:
    """A layer's own account; sizes are global."""
    if isinstance(layer, Attention):
        return layer.collectives(batch, sequence, dtype)
    if isinstance(layer, VocabParallelEmbedding):
        return layer.collectives((batch, sequence), dtype)
    return layer.collectives((batch, sequence, model.width), dtype)
