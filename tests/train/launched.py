"""A training run on the ranks of a test, as the launcher does it."""

from __future__ import annotations

import os

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.train import launch
from shardgrad.train.config import Config
from shardgrad.train.prepare import prepare


def launched(mesh: DeviceMesh, config: Config, *, page: bool = False) -> None:
    """What the launcher does on every rank of a mesh. page: with the page as well, which takes a second."""
    start = prepare(config) if torch.distributed.get_rank() == 0 else None
    try:
        with pytest.MonkeyPatch.context() as patched:
            if not page:
                patched.setattr(launch, "write_page", lambda _: None)
            launch.run(mesh, config, start)
    finally:
        if start is not None and start.lock is not None:
            os.close(start.lock)
    torch.distributed.barrier()
