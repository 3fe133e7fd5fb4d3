"""What torchrun starts as each rank of a cell: build, measure, leave a file.

python -m shardgrad.scale.worker FOLDER: reads FOLDER/cell.json; leaves FOLDER/rank-N.json, or FOLDER/rank-N.error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from shardgrad.comm.rendezvous import start_process_group
from shardgrad.comm.trace import trace_collectives
from shardgrad.scale import work
from shardgrad.scale.cell import Cell
from shardgrad.scale.group import end_with_parent
from shardgrad.scale.measure import Measured, measure, resident


def main(folder: Path) -> int:
    """Run as one rank; returns the exit status."""
    end_with_parent()
    rank = int(os.environ["RANK"])
    try:
        measured = _run(json.loads((folder / "cell.json").read_text()))
    except Exception as error:
        text = "".join(traceback.format_exception_only(error)).strip()
        traceback.print_exc()
        (folder / f"rank-{rank}.error").write_text(json.dumps({"time": time.time(), "rank": rank, "error": text}))
        sys.stderr.flush()
        os._exit(1)  # threads of the backend may wait for a rank that is gone
    path = folder / f"rank-{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(measured.as_json()))
    path.with_suffix(".part").rename(path)
    return 0


def _run(settings: dict[str, object]) -> Measured:
    cell = Cell.model_validate(settings["cell"])
    seed, warmup, repeats, timeout = (settings[key] for key in ("seed", "warmup", "repeats", "timeout_s"))
    if cell.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(cell.threads)
    watch = start_process_group(str(cell.backend), timedelta(seconds=float(timeout)))  # type: ignore[arg-type]
    mesh = work.make_mesh(cell)
    _load(torch.device(mesh.device_type))
    before = resident()
    built = work.make(cell, mesh, seed)  # type: ignore[arg-type]
    device = torch.device(cell.device, torch.cuda.current_device()) if cell.device == "cuda" else torch.device("cpu")
    measured = measure(built, device, warmup, repeats, before)  # type: ignore[arg-type]
    dist.barrier()
    watch.leave()
    del built, mesh
    dist.destroy_process_group()
    gc.collect()
    return measured


def _load(device: torch.device) -> None:
    """Use once what torch loads at its first use, so that it is not counted as the cell's memory."""
    x = torch.ones(8, 8, device=device, requires_grad=True)
    (x @ x).sum().backward()
    dist.all_reduce(torch.ones(8, device=device))
    with trace_collectives():
        dist.barrier()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
