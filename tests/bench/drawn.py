"""Rows of measurements that were never taken, to draw."""

from __future__ import annotations

import random

from shardgrad.bench import bytes as sent
from shardgrad.bench import collectives, exact, model, overlap, step
from shardgrad.bench.timing import Spread


def spread(rng: random.Random, low: float, high: float) -> Spread:
    middle = rng.uniform(low, high)
    return Spread(middle, 0.9 * middle, 1.15 * middle)


def bytes_rows() -> list[sent.Row]:
    return sent.rows([(4096, 4096, 4096), (65536, 1024, 4096)], [4, 16, 64])


def collectives_rows() -> list[collectives.Row]:
    sizes = (2048, 64 * 2**10, 8 * 2**20)
    rows = [
        collectives.Row(name, size, 2, 90 + size / 800, 9 + size / 2000) for name in ("all-reduce", "all-gather")
        for size in sizes
    ]  # fmt: skip
    return [*rows, collectives.Row("barrier", 0, 2, 80.0, 3.0)]


def step_found() -> step.Found:
    rng, rows = random.Random(0), []
    for backend in ("gloo", "shm"):
        for name in ("shardgrad", "hand-written", "DTensor"):
            for size in ((64, 256, 1024), (256, 512, 2048)):
                to_hand = spread(rng, 0.9, 4.5 if name == "DTensor" else 1.2)
                rows.append(step.Row("bfloat16", size, name, backend, to_hand.scaled(900), to_hand, None, None, None))
    return step.Found(rows, [])


def model_rows() -> list[model.Row]:
    rng = random.Random(1)
    return [
        model.Row(part, ranks, spread(rng, 20, 30), spread(rng, 30_000, 50_000), spread(rng, 1, 2), 2**25)
        for part in model.PARTS
        for ranks in (1, 2)
    ]


def overlap_rows() -> list[overlap.Row]:
    rng = random.Random(2)
    return [
        overlap.Row(case, "float32", size, name, *(spread(rng, 100, 900) for _ in range(4)), spread(rng, 0, 0.9), None)
        for size in ((256, 512, 2048), (512, 1024, 4096))
        for name in (overlap.WHOLE, overlap.CHUNKED, "Megatron-core")
        for case in overlap.CASES
    ]


def exact_rows() -> list[exact.Row]:
    rng, size = random.Random(3), (64, 256, 1024)
    return [
        exact.Row(part, "float32", size, pieces, ranks, True, spread(rng, 1, 2), spread(rng, 1, 2), spread(rng, 1, 2.5),
                  spread(rng, 1, 2), (1, 1), (1, 1), 3)
        for part in (*exact.PRODUCTS, exact.STEP)
        for pieces in (2, 4, 8)
        for ranks in (1, 2)
    ]  # fmt: skip
