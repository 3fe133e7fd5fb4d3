"""torch's products over symmetric memory on CPUs: its own fallbacks, which communicate and then multiply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed._symmetric_memory as symmetric


@contextmanager
def fused_on_cpu() -> Iterator[list[str]]:
    """A block in which `torch.ops.symm_mem`'s two products have kernels for CPUs; yields the names of those called."""
    called: list[str] = []

    def noting(name: str):  # type: ignore[no-untyped-def]
        fallback = getattr(symmetric, f"_{name}_fallback")

        def kernel(*args, **kwargs):  # type: ignore[no-untyped-def]
            called.append(name)
            return fallback(*args, **kwargs)

        return kernel

    library = torch.library.Library("symm_mem", "IMPL")
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        library.impl(name, noting(name), "CPU")
    try:
        yield called
    finally:
        library._destroy()
