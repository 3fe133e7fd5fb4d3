"""Every collective of one training step of the GPT, from layouts and sizes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from shardgrad.comm.mesh import view
from shardgrad.layout.cost import Collective, itemsize, sent
from shardgrad.nn.attention import Attention
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.linear import ColumnParallelLinear, RowParallelLinear
from shardgrad.nn.norm import LayerNorm
from shardgrad.nn.positions import LearnedPositions
from shardgrad.train.model import GPT


def step_collectives(model: GPT, batch: int, sequence: int, dtype: Any = "float32") -> list[Collective]:
    """What this rank sends in forward and backward of one loss over ids [batch, sequence], every parameter trained.

    The comparisons between ranks that a layer makes when it first sees a shape are not listed.
    """
    found: list[Collective] = []
    for path, module in model.named_modules():
        found += [
            Collective(c.phase, c.operation, f"{path}: {c.tensor}", c.axis, c.bytes)
            for c in _collectives(module, model, batch, sequence, dtype)
        ]
    # Of each token: the maximum over the vocabulary; then the sum of exponentials and the target's logit.
    tokens = batch * sequence
    found += _one(model, "forward", "all-reduce", "loss: maxima", tokens, dtype)
    found += _one(model, "forward", "all-reduce", "loss: sums", 2 * tokens, dtype)
    return found


def _collectives(module: nn.Module, model: GPT, batch: int, sequence: int, dtype: Any) -> list[Collective]:
    mesh_view = view(model.mesh)
    ranks = mesh_view.axis(model.axis).size
    if isinstance(module, Attention):
        return module.collectives(batch, sequence, dtype)
    if isinstance(module, ColumnParallelLinear | RowParallelLinear):
        sizes = {"b": batch, "s": sequence, "d": module.in_features, "m": module.out_features}
        return module.layout(3).collectives(sizes, mesh_view.shape, dtype, coordinate=mesh_view.coordinate)
    most = -(-sequence // ranks)  # the sequence's longest shard, to which the others are padded
    if isinstance(module, VocabParallelEmbedding):
        row = module.embedding_dim
        return [
            *_one(model, "forward", "reduce-scatter", "Y", batch * ranks * most * row, dtype),
            *_one(model, "dW", "all-gather", "dY", batch * most * row, dtype),
        ]
    if isinstance(module, LearnedPositions):
        return _one(model, "dW", "all-gather", "dW", most * module.weight.shape[1], dtype)
    if isinstance(module, LayerNorm):
        both = sum(parameter.numel() for parameter in module.parameters())
        return _one(model, "dW", "all-reduce", "dW and db", both, dtype)
    return []


def _one(model: GPT, phase: str, operation: str, tensor: str, elements: int, dtype: Any) -> list[Collective]:
    axis = view(model.mesh).axis(model.axis)
    if axis.size == 1:
        return []
    count = sent(operation, elements, axis.size, axis.index) * itemsize(dtype)
    return [Collective(phase, operation, tensor, axis.name, count)]


def totals(collectives: Iterable[Collective]) -> dict[tuple[str, str], tuple[int, int]]:
    """Count and bytes by (operation, axis), as `Trace.totals`."""
    counts: Counter[tuple[str, str]] = Counter()
    sums: Counter[tuple[str, str]] = Counter()
    for one in collectives:
        counts[one.operation, one.axis] += 1
        sums[one.operation, one.axis] += one.bytes
    return {key: (counts[key], sums[key]) for key in counts}
