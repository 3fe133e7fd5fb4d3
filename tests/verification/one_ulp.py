"""How often an error of one ulp, in one element of Y on one rank, is seen; beside what the check says of its power.

torchrun --standalone --nproc-per-node 2 tests/verification/one_ulp.py 40 0 bfloat16
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from many import mesh_of
from torch import Tensor

import shardgrad as sg
from shardgrad.verification import product

sys.path.insert(0, str(Path(__file__).parents[1]))
from layouts import grids, random_layout, random_sizes

_INTEGERS = {2: torch.int16, 4: torch.int32}


def off_by_one_ulp(y: Tensor, rng: random.Random) -> bool:
    """Change one element that is not zero to the next number of its dtype, away from zero or towards it; whether there
    is such an element."""
    bits = y.detach().view(_INTEGERS[y.itemsize]).view(-1)
    places = (y.detach().view(-1) != 0).nonzero().flatten().tolist()
    at, step = rng.random(), rng.choice((-1, 1))
    if places:
        bits[places[int(at * len(places))]] += step
    return bool(places)


def main(count: int, seed: int = 0, dtype: str = "bfloat16") -> None:
    """Print of how many errors how many were seen, and the mean share that the checks had said."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rng = random.Random(1000 * seed + ranks)
    seen, said = [], []
    real, planted = product.matmul, [False]

    def wrong(*given: Any, **named: Any) -> Tensor:
        y = real(*given, **named).contiguous()
        planted[0] = rank == 0 and off_by_one_ulp(y, own)
        return y

    product.matmul = wrong  # type: ignore[assignment]
    while len(seen) < count:
        grid = rng.choice([g for dims in (1, 2, 3) for g in grids(ranks, dims)])
        layout = random_layout(rng, ("p", "q", "r")[: len(grid)])
        sizes, own = random_sizes(rng, layout), random.Random(rng.random())
        if layout.letters and rng.random() < 0.3:
            sizes[rng.choice(layout.letters)] = rng.randint(10, 400)
        found = sg.check_product(layout, sizes, mesh_of(grid), dtype=getattr(torch, dtype), seed=rng.randrange(2**31))
        everywhere = torch.tensor(int(planted[0]))
        dist.broadcast(everywhere, 0)
        if everywhere:
            seen.append(not found.worst["Y"].ok)
            said.append(found.power["Y"].ulp if hasattr(found, "power") else float("nan"))
    if rank == 0:
        print(f"{dtype}, {ranks} ranks: {sum(seen)} of {count} errors of one ulp seen; said: {sum(said) / count:.0%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
