"""Calls of all that has a forward and a backward, on a mesh of two ranks. Every size is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.train.build import build_model
from shardgrad.train.config import Config
from shardgrad.train.step import backward

Call = Callable[[Tensor], Tensor]
"""Of x [4, 6]; what it returns is summed, and differentiated, by the caller."""

CHOICES = 24
"""Of experts, by a rank's tokens."""

MODELS = "GPT", "Llama"
"""With what the names of whole models' calls begin."""


def _sequence(tp: DeviceMesh, name: str, *args: Any, size: int = 8) -> Call:
    """A layer over rows that the axis shards, of which there are so many."""
    layer = getattr(sg, name)(*args, sequence_dim=0, mesh=tp)
    return lambda x: layer(x, size)


def _matmul(tp: DeviceMesh, text: str, rows: int, columns: int) -> Call:
    weight, bias = nn.Parameter(torch.randn(rows, columns)), nn.Parameter(torch.randn(columns))
    return lambda x: sg.matmul(x, weight, text, tp, bias, {"n": 8, "d": 6, "m": 10})


def _convolve(tp: DeviceMesh) -> Call:
    weight = nn.Parameter(torch.randn(5, 1, 3))
    layout = "X[b/tp,c,h] W[o,c,i] -> Y[b/tp,o,p]"
    return lambda x: sg.convolve(x.unsqueeze(1), weight, layout, tp, padding=1, sizes={"b": 8})


def _loss(tp: DeviceMesh, reduction: str) -> Call:
    target = torch.randint(12, (4,))
    return lambda x: sg.vocab_parallel_cross_entropy(
        x, target, vocab_size=12, mesh=tp, label_smoothing=0.1, reduction=reduction
    )


def _embedding(tp: DeviceMesh) -> Call:
    table = sg.VocabParallelEmbedding(9, 6, 2, mesh=tp)
    ids = torch.randint(9, (4,))
    return lambda x: table.logits(x * table(ids))


def _block(tp: DeviceMesh) -> Call:
    parts = sg.Attention(6, 3, mesh=tp, reduce=False), sg.SwiGLU(6, 5, mesh=tp, reduce=False)
    block = sg.ParallelBlock(sg.RMSNorm(6, mesh=tp), *parts)
    return lambda x: block(x.unsqueeze(0))


def _experts(tp: DeviceMesh, gated: bool) -> Call:
    layer = sg.MoE(6, 5, 4, axis="tp", mesh=tp, gated=gated)

    def call(x: Tensor) -> Tensor:
        y, balance = layer(torch.cat((x, x, x)))
        return y.sum() + balance

    return call


def _clipped(tp: DeviceMesh, order: float) -> Call:
    """The gradients' norm, with a layer that has none."""
    layers = nn.ModuleList([sg.ColumnParallelLinear(6, 7, mesh=tp), sg.RMSNorm(6, mesh=tp), sg.MLP(6, 5, mesh=tp)])

    def call(x: Tensor) -> Tensor:
        layers[0](layers[1](x)).sum().backward()
        return x.sum() + sg.clip_grad_norm_(layers, 1.0, order)

    return call


def _deferred(tp: DeviceMesh) -> Call:
    layer = sg.MLP(6, 10, mesh=tp, sequence_dim=0)

    def call(x: Tensor) -> Tensor:
        with sg.defer_weight_grads() as later:
            layer(x, 8).sum().backward()
        later.run()
        return x.sum()

    return call


def _main_grads(tp: DeviceMesh) -> Call:
    layer = sg.MLP(6, 10, mesh=tp, dtype=torch.bfloat16)
    sg.use_main_grads(layer.parameters())
    return lambda x: layer(x.bfloat16())


def _trained(mesh: DeviceMesh, kind: str, fully_sharded: bool, **more: Any) -> Call:
    """Gradients of a model of the training program, over two micro-batches, with blocks that are computed again."""
    model = {"kind": kind, "layers": 2, "heads": 2, "d_model": 8, "seq_len": 6}
    config = Config.model_validate(
        {
            "model": model | more,
            "train": {"steps": 1, "batch": 4, "lr": 1e-3, "recompute": "full"},
            "mesh": {"dp": mesh["dp"].size(), "tp": mesh["tp"].size(), "fully_sharded": fully_sharded},
        }
    )
    made = build_model(config, 12, mesh)
    made.train()

    def call(x: Tensor) -> Tensor:
        ids = torch.randint(12, (4, 6))
        loss = backward(made, ids, ids, 2)
        return x.sum() * loss + sg.clip_grad_norm_(made, 1.0)

    return call


def calls(tp: DeviceMesh, dp_tp: Sequence[DeviceMesh]) -> dict[str, Callable[[], Call]]:
    """What makes each call, by name.

    tp: a mesh of one axis of two ranks. dp_tp: meshes of 1 × 2 and 2 × 1 ranks.
    """
    return {
        "ColumnParallelLinear": lambda: _sequence(tp, "ColumnParallelLinear", 6, 10),
        "RowParallelLinear": lambda: _sequence(tp, "RowParallelLinear", 12, 10, size=4),
        "MLP": lambda: _sequence(tp, "MLP", 6, 10),
        "SwiGLU": lambda: _sequence(tp, "SwiGLU", 6, 10),
        "LayerNorm": lambda: sg.LayerNorm(6, mesh=tp, sequence_dim=0),
        "RMSNorm": lambda: sg.RMSNorm(6, mesh=tp),
        "Attention": lambda: (lambda layer: lambda x: layer(x.unsqueeze(0)))(sg.Attention(6, 3, mesh=tp)),
        "ParallelBlock": lambda: _block(tp),
        "VocabParallelEmbedding": lambda: _embedding(tp),
        "LearnedPositions": lambda: (lambda layer: lambda x: layer(4) * x)(sg.LearnedPositions(4, 6, mesh=tp)),
        "Rotary": lambda: lambda x: sg.Rotary(2)(x.view(1, 4, 3, 2), torch.arange(4)),
        "Linear": lambda: sg.Linear(6, 10, layout="X[n,d] W[m/tp,d] -> Y[n,m/tp]", mesh=tp),
        "Conv1d": lambda: (lambda layer: lambda x: layer(x.unsqueeze(1)))(sg.Conv1d(1, 5, 3, mesh=tp)),
        "Conv2d": lambda: (lambda layer: lambda x: layer(x[None, None]))(sg.Conv2d(1, 5, 3, mesh=tp)),
        "Dropout": lambda: (lambda layer: lambda x: layer(x, {"n": 8}))(sg.Dropout(0.3, "X[n/tp,d]", mesh=tp)),
        "Dropout, features": lambda: (lambda layer: lambda x: layer(x, {"d": 12}))(
            sg.Dropout(0.3, "X[n,d/tp]", mesh=tp)
        ),
        "Dropout of all": lambda: sg.Dropout(1.0, "X[n,d]", mesh=tp),
        "MoE": lambda: _experts(tp, True),
        "MoE, not gated": lambda: _experts(tp, False),
        "matmul, data parallel": lambda: _matmul(tp, "X[n/tp,d] W[d,m] -> Y[n/tp,m]", 6, 10),
        "matmul, fully sharded": lambda: _matmul(tp, "X[n/tp,d] W[d/tp,m] -> Y[n/tp,m]", 3, 10),
        "convolve": lambda: _convolve(tp),
        "cross entropy, mean": lambda: _loss(tp, "mean"),
        "cross entropy, none": lambda: _loss(tp, "none"),
        "clip_grad_norm_": lambda: _clipped(tp, 2.0),
        "clip_grad_norm_, inf": lambda: _clipped(tp, inf),
        "clip_grad_norm_, -inf": lambda: _clipped(tp, -inf),
        "defer_weight_grads": lambda: _deferred(tp),
        "use_main_grads": lambda: _main_grads(tp),
        "all_gather": lambda: lambda x: sg.all_gather(x, tp, size=8),
        "reduce_scatter": lambda: lambda x: sg.reduce_scatter(x, tp),
        "all_reduce": lambda: lambda x: sg.all_reduce(x, tp),
        "all_to_all": lambda: lambda x: sg.all_to_all(x, tp, split_dim=1, concat_dim=0, size=8),
        "all_to_all_rows": lambda: lambda x: sg.all_to_all_rows(x, tp, send=[3, 1], receive=[3, 5]),
        "gather_replicated": lambda: lambda x: sg.gather_replicated(x, tp, size=8),
        "slice_replicated": lambda: lambda x: sg.slice_replicated(x, tp),
        "replicate": lambda: lambda x: sg.replicate(x, tp),
        "GPT": lambda: _trained(dp_tp[0], "gpt", False, dropout=0.1),
        "GPT, fully sharded": lambda: _trained(dp_tp[1], "gpt", True, dropout=0.1),
        "Llama": lambda: _trained(dp_tp[0], "llama", False),
    }
