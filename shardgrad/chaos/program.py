"""What a rank runs until something happens to it: `python -m shardgrad.chaos.program FOLDER BACKEND train CONFIG`, or
`… layers` for a program of one's own, which uses torch's start and nothing of shardgrad but its layers."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path

from shardgrad.chaos.deaths import Backend

_STEPS = 100_000


def main(folder: Path, backend: Backend, what: str, config: str | None = None) -> int:
    """Leave this process's number in the folder, and run."""

    def here() -> None:
        (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))

    if backend == "gloo":
        os.environ.pop("LOCAL_WORLD_SIZE", None)  # ranks that may be anywhere use gloo
    if what == "train":
        here()
        from shardgrad.train.launch import main as train

        return train([str(config)])
    return _layers(backend, here)


def _layers(backend: Backend, here: Callable[[], None]) -> int:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import shardgrad as sg

    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    up, down = sg.ColumnParallelLinear(32, 64, mesh=mesh), sg.RowParallelLinear(64, 32, mesh=mesh)
    x = torch.randn(8, 32, requires_grad=True)
    for step in range(_STEPS):
        down(up(x)).sum().backward()
        if step == 0:  # torch's own start, which waits as long as it is told to, is not what is attacked
            here()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], *sys.argv[3:]))  # type: ignore[arg-type]
