"""Folders of models as transformers writes them, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small_models import plain
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg


def line(world_size: int) -> Any:
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))


def saved(name: str, folder: Path, **how: Any) -> Any:
    """A plain model, the same on every rank, and its folder as transformers writes it."""
    model = plain(name)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, **how)
    dist.barrier()
    return model


def assert_same(found: Any, expected: Any) -> None:
    """Global states, and the buffers that states do not have, are the same to the bit."""
    states = sg.state_dict(found), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert states[0][name].dtype == tensor.dtype, name
        assert torch.equal(states[0][name], tensor), name
    buffers = dict(found.named_buffers())
    for name, buffer in expected.named_buffers():
        assert buffers.pop(name).equal(buffer), name
    assert not buffers


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the safetensors files of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
