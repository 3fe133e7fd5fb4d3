"""Symmetric memory: torch's products that communicate as they multiply."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

_FUSED = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")


def fused_products() -> tuple[Any, Any]:
    """torch's product with a gathered tensor, `(shard, rights, dim, group's name, return_A=)`, and its product with a
    reduce-scatter, `(left, right, "sum", dim, group's name)`. They define themselves when their module is imported."""
    import torch.distributed._symmetric_memory

    gathering, reducing = (getattr(torch.ops.symm_mem, name).default for name in _FUSED)
    return gathering, reducing


def lacks_fused_products(device: torch.device) -> str | None:
    """Why a device cannot run `fused_products`; None if nothing is known against it."""
    try:
        fused_products()
    except (ImportError, AttributeError):
        return f"torch {torch.__version__} has no products over symmetric memory"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if not all(has(f"symm_mem::{name}", device.type.upper()) for name in _FUSED):
        return f"its tensors are on {device.type}, and torch's products over symmetric memory run on CUDA alone"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def begin_symmetric_memory(group: dist.ProcessGroup) -> None:
    """Have the ranks of a group map some of one another's memory: where that is impossible, it raises."""
    from torch.distributed._symmetric_memory import get_symm_mem_workspace

    get_symm_mem_workspace(cast(Any, group.group_name), 2**20)


def as_own_tensor(x: torch.Tensor, shape: Any) -> torch.Tensor:
    """A contiguous result in another shape, and not as a view: no view may leave an autograd Function and be changed in
    place."""
    made: torch.Tensor = torch.ops.aten._unsafe_view.default(x.contiguous(), shape)
    return made
