"""How much of what is allowed correct programs use: the measurement behind SLACK. Not a test; run it with torchrun.

torchrun --standalone --nproc-per-node 3 tests/verification/spread.py float32 20
"""

from __future__ import annotations

import re
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.train.build import build_reference
from shardgrad.train.config import Model
from shardgrad.train.model import GPT

SIZES = {"layers": 2, "heads": 3, "d_model": 24, "seq_len": 12, "vocab": 61}


def main(dtype: torch.dtype, seeds: int) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    worst: dict[str, list[tuple[float, float, float, str]]] = {}
    wrong = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = GPT(**SIZES, mesh=mesh, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and seed % 2:
                    parameter.mul_(10)  # sharp attention and a confident softmax
        batch = tuple(torch.randint(0, SIZES["vocab"], (3, 11)) for _ in range(2))
        report = sg.verify(
            model,
            build_reference(Model(**{k: n for k, n in SIZES.items() if k != "vocab"}), SIZES["vocab"]),
            batch,
            mesh,
            loss=lambda m, *b: m.loss(*b),
            names=lambda name: re.sub(r"(query|key|value|output)_(weight|bias)", r"\1.\2", name),
            seed=100 * seed,
        )
        for row in report.rows:
            size = "scalars" if not row.shape else "vectors" if len(row.shape) == 1 else "matrices"
            worst.setdefault(size, []).append((row.ratio, row.element, row.score, f"{row.kind} of {row.name}"))
        wrong += [f"seed {seed}: {row.kind} of {row.name} {row.score:.2f}" for row in report.rows if not row.ok]
    if dist.get_rank() == 0:
        print(f"{dtype}, {dist.get_world_size()} ranks, {seeds} seeds, {sum(map(len, worst.values()))} tensors")
        for size, rows in worst.items():
            told = [max(rows, key=lambda row, at=at: row[at]) for at in range(3)]
            print(f"  {size:9} norm {told[0][0]:.2f}, element {told[1][1]:.2f}, of what is allowed {told[2][2]:.2f}"
                  f"  ({told[2][3]})")  # fmt: skip
        print("  accused:", wrong or "none")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), int(sys.argv[2]))
