"""Which torch.distributed backend a program's ranks should use."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from shardgrad.comm.shm.platform import unsupported
from shardgrad.comm.shm.register import register


def choose(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """ "nccl" for CUDA ranks; "shm" for CPU ranks that all run on this host, where it works; else "gloo".

    LOCAL_WORLD_SIZE and WORLD_SIZE, which torchrun sets, say how many ranks run here and in all. Without either, a
    process is alone; where only the second is set, it is not known where the others are.
    """
    if device == "cuda":
        return "nccl"
    ranks, here = (environment.get(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks != here or unsupported():
        return "gloo"
    register()
    return "shm"


def let_nccl_go_first(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have NCCL's kernels begin before products that wait for the device with them, unless the user has decided.

    dX's all-reduce is begun before the product of dW, which would otherwise fill the device first. torch reads the
    variable as it makes a process group. It changes when kernels run, and no value.
    """
    environment.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
