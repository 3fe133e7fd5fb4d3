"""Right code stays within its bounds: random legal layouts, dtypes, sizes and data, on the ranks that torchrun starts.

torchrun --standalone --nproc-per-node 4 tests/verification/many.py 3000
"""

from __future__ import annotations

import random
import sys
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg

sys.path.insert(0, str(Path(__file__).parents[1]))
from layouts import grids, random_layout, random_sizes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@cache
def mesh_of(grid: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", grid, mesh_dim_names=("p", "q", "r")[: len(grid)])


def case(rng: random.Random, ranks: int) -> sg.ProductCheck:
    """One random product, checked; alike on every rank."""
    grid = rng.choice([g for dims in (1, 2, 3) for g in grids(ranks, dims)])
    layout = random_layout(rng, ("p", "q", "r")[: len(grid)])
    sizes = random_sizes(rng, layout)
    if layout.letters and rng.random() < 0.3:  # one long letter
        sizes[rng.choice(layout.letters)] = rng.randint(10, 400)
    dtype = rng.choice(DTYPES)
    wide = [other for other in DTYPES if other.itemsize >= dtype.itemsize]
    return sg.check_product(
        layout,
        sizes,
        mesh_of(grid),
        dtype=dtype,
        bias=layout.has_bias or rng.random() < 0.5,
        reduce_dtype=rng.choice((None, None, *wide)),
        save_gathered=rng.choice([(), ("X",), ("W",), ("X", "W")]),
        exact=rng.random() < 0.3,
        data=rng.choice(("normal", "positive", "wide")),
        seed=rng.randrange(2**31),
    )


def main(count: int, seed: int = 0) -> int:
    """Run so many cases; print each violation, and the largest ratios. Returns how many cases failed."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rng = random.Random(1000 * seed + ranks)
    wrong, elements, odd = 0, 0, 0
    largest: dict[tuple[str, str, str], tuple[float, float, int]] = {}
    for _ in range(count):
        check = case(rng, ranks)
        for name, worst in check.worst.items():
            key = (str(check.dtype).removeprefix("torch."), "exact" if check.exact else "bound", name)
            ratio, likely, times = largest.get(key, (0.0, 0.0, 0))
            largest[key] = max(ratio, worst.ratio), max(likely, worst.likely), times + 1
            elements += 1
            odd += worst.suspicious
        if not check.ok:
            wrong += 1
            if rank == 0:
                print(check, flush=True)
    if rank == 0:
        for (dtype, how, name), (ratio, likely, times) in sorted(largest.items()):
            print(f"{dtype:<9} {how:<6} {name:<3} {times:>6} tensors, largest ratio {ratio:.4f}, likely {likely:.4f}")
        print(
            f"{count} products, {elements} tensors, on {ranks} ranks: {wrong} outside of their bound, {odd} tensors "
            "within, but outside of the likely one"
        )
    dist.destroy_process_group()
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main(*map(int, sys.argv[1:])) else 0)
