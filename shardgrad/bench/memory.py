"""What layers keep in memory for backward, counted, beside the formulas of Korthikanti et al. 2022 (arXiv 2205.05198).

Nothing is communicated and nothing is timed: one process builds one rank of any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from shardgrad.comm import shim
from shardgrad.nn.attention import Attention
from shardgrad.nn.mlp import MLP
from shardgrad.nn.norm import LayerNorm

SCHEMES = ("tp", "tp+sp")
RECOMPUTED = ("nothing", "attention", "block")


def kept_bytes(call: Callable[[], object], besides: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of a call, each storage counted once and whole; also where tensors
    have shapes alone (`shim.without_memory`).

    besides: tensors, such as parameters, that would be there anyway.
    """
    own = {shim.storage_number(tensor) for tensor in besides}
    alive: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        number = shim.storage_number(tensor)
        if number not in own:
            alive.setdefault(number, tensor)  # held, so that its number is not given to another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(tensor.untyped_storage().nbytes() for tensor in alive.values())
    del result
    return total


@dataclass(frozen=True, slots=True)
class Sizes:
    """The letters of the paper: sequence, batch, hidden features, attention heads, tensor parallel ranks."""

    s: int
    b: int
    h: int
    a: int
    t: int


def paper(x: Sizes, scheme: str, recompute: str) -> float:
    """Activation bytes of a transformer layer by the paper's table 2: 16-bit activations, dropout masks of one byte.

    recompute "attention" is the paper's selective recomputation, of scores, softmax and their product with V.
    """
    sbh, scores = x.s * x.b * x.h, 5 * x.a * x.s / x.h
    if recompute == "block":
        return 2 * sbh / (x.t if scheme == "tp+sp" else 1)
    scores = 0 if recompute == "attention" else scores
    if scheme == "tp":
        return sbh * (10 + 24 / x.t + scores / x.t)
    return sbh / x.t * (34 + scores)


def expected(x: Sizes, scheme: str, recompute: str) -> float:
    """Bytes that shardgrad's block keeps on a rank, where every size divides.

    The paper's terms without its two dropout masks, because the block has no dropout, and without the s² scores,
    because torch's fused attention keeps none: of each row and head one log-sum instead.
    """
    width = statistics = 2  # bytes of an activation; of a norm's mean and inverse deviation, on CPUs in its dtype
    sbh, sb = x.s * x.b * x.h, x.s * x.b
    rows = x.t if scheme == "tp+sp" else 1
    residual = width * sbh / rows
    if recompute == "block":
        return residual
    norms = 2 * (residual + 2 * statistics * sb / rows)
    heads = 4 * width * sbh / x.t + max(4, width) * x.a * sb / x.t  # Q, K, V, A; the log-sums are at least float32
    attention = residual + (0 if recompute == "attention" else heads)
    return norms + attention + residual + 8 * width * sbh / x.t


class _Block(nn.Module):
    """X + Attention(norm(X)), then X + MLP(norm(X))."""

    def __init__(self, x: Sizes, scheme: str, recompute: str, where: dict[str, Any]) -> None:
        super().__init__()
        where = {**where, "sequence_dim": 1 if scheme == "tp+sp" else None}
        self.recompute, self.sequence = recompute, x.s
        self.first, self.second = LayerNorm(x.h, **where), LayerNorm(x.h, **where)
        self.attention, self.mlp = Attention(x.h, x.a, **where), MLP(x.h, 4 * x.h, **where)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._block, x, use_reentrant=False) if self.recompute == "block" else self._block(x)

    def _block(self, x: Tensor) -> Tensor:
        normed = self.first(x)
        if self.recompute == "attention":
            x = x + checkpoint(self.attention, normed, self.sequence, use_reentrant=False)
        else:
            x = x + self.attention(normed, self.sequence)
        return x + self.mlp(self.second(x), self.sequence)


def counted(x: Sizes, scheme: str, recompute: str) -> int:
    """Bytes that the first of t ranks keeps for one block's backward, inside `one_rank_of(t)`."""
    mesh = init_device_mesh("cpu", (x.t,), mesh_dim_names=("tp",))
    block = _Block(x, scheme, recompute, {"mesh": mesh, "dtype": torch.bfloat16})
    rows = x.s // x.t if scheme == "tp+sp" else x.s
    inputs = torch.randn(x.b, rows, x.h).bfloat16().requires_grad_()
    block(inputs)  # the first call compares layouts between ranks
    return kept_bytes(lambda: block(inputs), block.parameters())


@contextmanager
def one_rank_of(ranks: int) -> Iterator[None]:
    """The first of so many ranks, of which there is no other: collectives return at once, with values of no meaning."""
    shim.join_imagined(0, ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; bytes of one rank."""

    sizes: Sizes
    scheme: str
    recompute: str
    counted: int
    expected: float
    paper: float


def measure(sizes: Iterable[Sizes]) -> list[Row]:
    """Every scheme and recomputation at each of some sizes."""
    rows = []
    for x in sizes:
        with one_rank_of(x.t):
            for scheme in SCHEMES:
                for recompute in RECOMPUTED:
                    count = counted(x, scheme, recompute)
                    rows.append(
                        Row(x, scheme, recompute, count, expected(x, scheme, recompute), paper(x, scheme, recompute))
                    )
    return rows
