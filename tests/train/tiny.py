"""Decoders whose every size is odd, uneven over any number of ranks, and different from every other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.train.build import build_reference
from shardgrad.train.config import Model
from shardgrad.train.decoder import Decoder
from shardgrad.train.llama import Llama
from shardgrad.train.model import GPT
from shardgrad.train.reference import Reference

SIZES: dict[str, Any] = {"layers": 2, "heads": 3, "d_model": 12, "seq_len": 6}
VOCAB = 7
BATCH, SEQUENCE = 2, 5


def fill(model: Decoder) -> dict[str, Tensor]:
    """Random values everywhere, norms and biases too; returns them, global, alike on all ranks."""
    generator = torch.Generator().manual_seed(2)
    values = {}
    for name, parameter, sharding in sg.named_shardings(model):
        assert sharding is not None
        values[name] = 0.5 * torch.randn(sharding.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.copy_(sg.shard(values[name], sharding.spec, sharding.mesh))
    return values


def gpt(mesh: DeviceMesh, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[GPT, dict[str, Tensor]]:
    """The sharded GPT and its values."""
    torch.manual_seed(1)
    model = GPT(**SIZES, vocab=VOCAB, mesh=mesh, dtype=dtype, **more)
    return model, fill(model)


def decoder(
    mesh: DeviceMesh, kind: str, dtype: torch.dtype = torch.float64, **more: Any
) -> tuple[Decoder, dict[str, Tensor]]:
    """The sharded decoder of a kind and its values."""
    torch.manual_seed(1)
    model = {"gpt": GPT, "llama": Llama}[kind](**SIZES, vocab=VOCAB, mesh=mesh, dtype=dtype, **more)
    return model, fill(model)


def reference(values: dict[str, Tensor] | None = None, **more: Any) -> Reference:
    """The same in plain torch, on one device, in float64."""
    plain = build_reference(Model(**{**SIZES, **more}), VOCAB).double()
    if values is not None:
        plain.load(values)
    return plain


def tokens(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Ids and targets [b, s]: random, and different from each other."""
    generator = torch.Generator().manual_seed(3)
    ids, targets = (torch.randint(0, VOCAB, (batch, SEQUENCE), generator=generator) for _ in range(2))
    return ids, targets
