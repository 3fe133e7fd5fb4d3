"""What a step is given, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardgrad.comm import shim

RANKS = 8


class NeedsGpuError(RuntimeError):
    """What a step is about is nowhere but on a GPU."""


@dataclass(frozen=True, slots=True)
class Setting:
    """dry: sizes that a CPU can do in a second, on whatever device there is."""

    device: torch.device
    dry: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def require_gpu(self) -> None:
        if not self.on_gpu:
            raise NeedsGpuError("needs a GPU")


@dataclass(frozen=True, slots=True)
class Finding:
    """figures: by name, numbers or short texts. conclusion: what follows, for a reader who sees nothing else.

    ok: whether it is as shardgrad assumes.
    """

    figures: dict[str, Any]
    conclusion: str
    ok: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """One question. limit: seconds."""

    name: str
    question: str
    find: Callable[[Setting], Finding] = field(repr=False)
    limit: int = 60


@contextmanager
def one_rank(setting: Setting) -> Iterator[DeviceMesh]:
    """A mesh of one rank, axis `tp`: over NCCL, or gloo on CPUs."""
    backend = "nccl" if setting.on_gpu else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh(setting.device.type, (1,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


@contextmanager
def one_of_eight(setting: Setting) -> Iterator[DeviceMesh]:
    """A mesh of eight ranks, axis `tp`, of which the others are imagined: collectives send nothing."""
    shim.join_imagined(0, RANKS)
    try:
        yield init_device_mesh(setting.device.type, (RANKS,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()
