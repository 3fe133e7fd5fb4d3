"""What a run ran on, for its report."""

from __future__ import annotations

import os
import platform

import torch
import torch.distributed as dist

from shardgrad.hardware import processor, version


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, as this rank sees them."""
    return {
        "shardgrad": version("shardgrad"),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": str(os.cpu_count()),
        "threads a rank": str(torch.get_num_threads()),
        "backend": str(dist.get_backend()),
    }
