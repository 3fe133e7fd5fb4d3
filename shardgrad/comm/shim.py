"""The one place that knows torch's private or renamed names."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# torch 2.13 renamed these two; the old names warn there and are the only ones before.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def store() -> Any:
    """The key-value store of the default process group: the one channel left when a collective has failed."""
    return dist.distributed_c10d._get_default_store()


def process_group(argument: Any) -> dist.ProcessGroup | None:
    """The process group inside an argument of a c10d operator, or None if it holds something else."""
    if isinstance(argument, dist.ProcessGroup):
        return argument
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument)
        except RuntimeError:
            return None
    return None
