"""A GPT whose every size is odd, uneven over any number of ranks, and different from every other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.train.model import GPT
from shardgrad.train.reference import ReferenceGPT

SIZES = {"layers": 2, "heads": 3, "d_model": 12, "seq_len": 6, "vocab": 7}
BATCH, SEQUENCE = 2, 5


def gpt(mesh: DeviceMesh, dtype: torch.dtype = torch.float64) -> tuple[GPT, dict[str, Tensor]]:
    """The model with random values everywhere, norms and biases too, and these values, global, alike on all ranks."""
    torch.manual_seed(1)
    model = GPT(**SIZES, mesh=mesh, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    values = {}
    for name, parameter, stored in sg.stored_parameters(model):
        assert stored is not None
        values[name] = 0.5 * torch.randn(stored.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.copy_(sg.shard(values[name], stored.spec, mesh))
    return model, values


def reference(values: dict[str, Tensor] | None = None) -> ReferenceGPT:
    """The same in plain torch, on one device, in float64."""
    plain = ReferenceGPT(**SIZES).double()
    if values is not None:
        plain.load(values)
    return plain


def tokens() -> tuple[Tensor, Tensor]:
    """Ids and targets [b, s]: random, and different from each other."""
    generator = torch.Generator().manual_seed(3)
    ids, targets = (torch.randint(0, SIZES["vocab"], (BATCH, SEQUENCE), generator=generator) for _ in range(2))
    return ids, targets
