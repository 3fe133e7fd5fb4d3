"""Where and with what a result was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import shardgrad
from shardgrad.hardware import cores, processor, version


def machine() -> dict[str, Any]:
    """The processor, its cores that this process may use, the memory and the GPUs."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.release()}",
        "host": platform.node(),
    }


def versions() -> dict[str, str]:
    return {
        "shardgrad": version("shardgrad"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The git commit of the code that runs, with a + where files were changed since; None outside a checkout."""
    root = str(Path(shardgrad.__file__).parents[1])
    found = _git(root, "rev-parse", "HEAD")
    if found is None:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "shardgrad")
    return found + ("+" if changed else "")


def describe_machine(facts: dict[str, Any]) -> str:
    """The machine in a line."""
    gpus = facts["gpus"]
    if gpus:
        return f"{len(gpus)} × {gpus[0]}; {facts['cores']} cores of {facts['cpu']}"
    memory = facts["memory_bytes"] / 2**30
    return f"{facts['cores']} core{'s' if facts['cores'] != 1 else ''} of {facts['cpu']}, {memory:.0f} GiB"


def _git(root: str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
