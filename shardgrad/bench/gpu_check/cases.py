"""A call of every layer, as one rank of eight: forward and backward, sizes told, the same tensors each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg

Call = Callable[[], list[Tensor]]
"""Forward and backward: returns Y and the gradients."""


def calls(mesh: DeviceMesh, d: int, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """By name. d: features, tokens: rows of the whole, both multiples of eight ranks times eight."""
    device, ranks, hidden = torch.device(mesh.device_type), mesh.size(), 2 * d
    where: dict[str, Any] = {"mesh": mesh, "dtype": dtype}
    own = tokens // ranks
    column = sg.ColumnParallelLinear(d, hidden, **where)
    column_sequence = sg.ColumnParallelLinear(d, hidden, sequence_dim=0, **where)
    mlp = sg.SwiGLU(d, hidden, sequence_dim=0, **where)
    embedding = sg.VocabParallelEmbedding(hidden, d, **where)
    ids = torch.arange(tokens, device=device) % hidden
    logits = torch.randn(tokens, hidden // ranks, device=device, requires_grad=True)

    def call(module: nn.Module, forward: Callable[[Tensor], Tensor], *shape: int) -> Call:
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        dy = torch.randn_like(forward(x))
        return _differentiated(lambda: forward(x), [x, *module.parameters()], dy)

    row = sg.RowParallelLinear(hidden, d, **where)
    row_sequence = sg.RowParallelLinear(hidden, d, sequence_dim=0, **where)
    norm = sg.RMSNorm(d, sequence_dim=0, **where)
    attention = sg.Attention(d, ranks, **where)
    dropout = sg.Dropout(0.1, "X[n,d]", mesh=mesh)
    embedded = torch.randn(tokens, d, device=device).to(dtype)
    return {
        "column": call(column, column, tokens, d),
        "column + sequence": call(column_sequence, lambda x: column_sequence(x, tokens), own, d),
        "row": call(row, row, tokens, hidden // ranks),
        "row + sequence": call(row_sequence, row_sequence, tokens, hidden // ranks),
        "SwiGLU + sequence": call(mlp, lambda x: mlp(x, tokens), own, d),
        "RMSNorm + sequence": call(norm, norm, own, d),
        "attention": call(attention, attention, 1, tokens, d),
        "dropout": call(dropout, dropout, tokens, d),
        "embedding": _differentiated(lambda: embedding(ids), [*embedding.parameters()], embedded),
        "loss": _differentiated(
            lambda: sg.vocab_parallel_cross_entropy(logits, ids, vocab_size=hidden, mesh=mesh),
            [logits],
            torch.ones((), device=device),
        ),
    }


def _differentiated(forward: Callable[[], Tensor], of: list[Tensor], dy: Tensor) -> Call:
    def call() -> list[Tensor]:
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, of, dy)]

    return call
