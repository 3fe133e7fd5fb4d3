"""What a run ran on, for its report."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torch.distributed as dist


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, as this rank sees them."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        shardgrad = version("shardgrad")
    except PackageNotFoundError:
        shardgrad = "not installed"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "shardgrad": shardgrad,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "hardware": hardware,
        "cores": str(os.cpu_count()),
        "threads a rank": str(torch.get_num_threads()),
        "backend": str(dist.get_backend()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
