"""Programs whose bits do not depend on the number of ranks, for `verify_exact`: a small decoder, and one step of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.train.decoder import Decoder, Recompute
from shardgrad.train.model import GPT

V = 4  # pieces of every axis
BATCH, SEQUENCE, WIDTH, HEADS, KV_HEADS, HIDDEN, VOCAB = 4, 8, 32, 8, 2, 40, 56
Clip = Callable[[nn.Module, float], Tensor]


def mesh_over(axis: str, ranks: int) -> DeviceMesh:
    """All ranks on one of the two axes, or on both."""
    shapes = {"dp": (ranks, 1), "tp": (1, ranks), "both": (2, ranks // 2)}
    return init_device_mesh("cpu", shapes[axis], mesh_dim_names=("dp", "tp"))


class Small(nn.Module):
    """A decoder of one block with all that a rank may get wrong: shared KV heads, dropout, smoothing, tied or not."""

    def __init__(self, mesh: DeviceMesh, sequence: bool, tied: bool = False) -> None:
        super().__init__()
        self.mesh = mesh
        parallel = sg.Parallel(mesh=mesh, data=sg.BatchAxis("dp"), sequence_dim=1 if sequence else None)
        self.embedding = sg.VocabParallelEmbedding(VOCAB, WIDTH, parallel=parallel)
        self.positions = sg.LearnedPositions(SEQUENCE, WIDTH, parallel=parallel)
        self.norm1 = sg.LayerNorm(WIDTH, parallel=parallel)
        self.attention = sg.Attention(WIDTH, HEADS, num_kv_heads=KV_HEADS, parallel=parallel)
        self.dropout = sg.Dropout(0.1, "X[b/dp,s/tp,d]" if sequence else "X[b/dp,s,d]", mesh=mesh)
        self.norm2 = sg.LayerNorm(WIDTH, parallel=parallel)
        self.mlp = sg.MLP(WIDTH, HIDDEN, parallel=parallel)
        self.norm3 = sg.RMSNorm(WIDTH, parallel=parallel)
        self.head = sg.ColumnParallelLinear(WIDTH, VOCAB, bias=False, parallel=parallel)
        if tied:
            self.head.weight = self.embedding.weight
        self.vocab_size, self.token_axes = VOCAB, ("dp",)

    def forward(self, ids: Tensor) -> Tensor:
        sizes = {"b": BATCH, "s": SEQUENCE}
        x = self.dropout(self.positions.add_to(self.embedding(ids), SEQUENCE), sizes)
        x = x + self.attention(self.norm1(x), SEQUENCE)
        x = x + self.mlp(self.norm2(x), SEQUENCE)
        return self.head(self.norm3(x), SEQUENCE)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return sg.vocab_parallel_cross_entropy(
            self(ids),
            targets,
            vocab_size=self.vocab_size,
            mesh=self.mesh,
            token_axes=self.token_axes,
            label_smoothing=0.1,
        )


@dataclass(frozen=True)
class Program:
    """sequence, tied: of `Small`. clip: how gradients are clipped. rate: of the step.

    after: what is done to the model between backward and clipping. planted: what is done to it when it is built, and is
    the bug; both on several ranks only, as is `clip`.
    """

    sequence: bool = False
    tied: bool = False
    clip: Clip = sg.clip_grad_norm_
    rate: float = 0.1
    after: Callable[[Small], None] | None = None
    planted: Callable[[Small], None] | None = None

    def build(self, mesh: DeviceMesh) -> Small:
        model = Small(mesh, self.sequence, self.tied)
        if self.planted is not None and mesh.size() > 1:
            self.planted(model)
        return model

    def step(self, model: Small, mesh: DeviceMesh) -> dict[str, Tensor]:
        wrong = mesh.size() > 1
        ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1))
        here = view(mesh).shape["dp"]
        mine = ids.chunk(here)[view(mesh).coordinate["dp"]]
        model.zero_grad()
        loss = model.loss(mine[:, :-1], mine[:, 1:])
        loss.backward()
        if self.after is not None and wrong:
            self.after(model)
        norm = (self.clip if wrong else sg.clip_grad_norm_)(model, 0.5)
        rate = self.rate if wrong else 0.1
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        return {"loss": loss.detach(), "norm": norm}


RIGHT = Program()
SEQUENCE_PARALLEL = replace(RIGHT, sequence=True)


@dataclass(frozen=True)
class Trained:
    """A model of shardgrad.train under AdamW, as `launch/train.py` trains it.

    micro: micro-batches of a step.
    """

    kind: type[Decoder] = GPT
    bf16: bool = False
    tied: bool = False
    dropout: float = 0.0
    kv_heads: int = 2
    micro: int = 1
    shard_params: bool = False
    recompute: Recompute = "none"

    def build(self, mesh: DeviceMesh) -> nn.Module:
        made: Any = self.kind
        model: nn.Module = made(
            layers=1,
            heads=HEADS,
            kv_heads=self.kv_heads,
            d_model=WIDTH,
            d_ff=HIDDEN,
            seq_len=SEQUENCE,
            vocab=VOCAB,
            tied=self.tied,
            dropout=self.dropout,
            compute_dtype=torch.bfloat16 if self.bf16 else None,
            reduce_dtype=torch.float32 if self.bf16 else None,
            recompute=self.recompute,
            data=sg.BatchAxis("dp", shard_params=self.shard_params),
            mesh=mesh,
        )
        model.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # type: ignore[assignment]
        return model

    def step(self, model: Any, mesh: DeviceMesh) -> dict[str, Tensor]:
        ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1))
        each = BATCH // self.micro
        here = each // view(mesh).shape["dp"]
        model.optimizer.zero_grad()
        losses = []
        for at in sg.micro_batches(mesh, self.micro):
            first = at * each + here * view(mesh).coordinate["dp"]
            mine = ids[first : first + here]
            loss = model.loss_sum(mine[:, :-1], mine[:, 1:], each, (at * each, BATCH)) / (BATCH * SEQUENCE)
            loss.backward()
            losses.append(loss.detach())
        norm = sg.clip_grad_norm_(model, 1.0)
        model.optimizer.step()
        return {"losses": torch.stack(losses), "norm": norm}
