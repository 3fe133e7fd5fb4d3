"""`shardgrad bench step`: one step of Linear–GELU–Linear, beside the hand-written one and other libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardgrad.cli import bench_options, options, style
from shardgrad.cli import ranks as processes

if TYPE_CHECKING:
    from shardgrad.bench.step import Found

EPILOG = style.examples(
    "shardgrad bench step",
    "shardgrad bench step --sizes 8x64x256,64x256x1024 --dtypes bf16 --rounds 41 --draw step.png",
)


def step(
    sizes: options.Sizes = "8x64x256, 64x256x1024, 256x512x2048, 512x1024x4096, 2048x1024x4096",
    dtypes: options.Dtypes = "fp32,bf16",
    rounds: options.Rounds = 11,
    ranks: options.Ranks = 2,
    backends: Annotated[str, typer.Option(help="gloo, shm")] = "gloo,shm",
    json: options.Json = False,
    draw: options.Draw = None,
) -> None:
    """Time forward + backward of Linear–GELU–Linear, tensor parallel: shardgrad, autograd Functions by hand, DTensor,
    fairscale, Megatron-core, and the local products alone.

    All in the same processes, in turns. Brackets are 95 % confidence intervals of medians.
    """
    parsed = bench_options.read_sizes(sizes, ranks)
    kinds = bench_options.read_dtypes(dtypes)
    wanted = bench_options.read_choice(backends, ("gloo", "shm"), "backends")
    style.check_file(draw)
    processes.start(ranks)

    from shardgrad.bench import step as bench

    machine = bench_options.machine()
    with processes.joined() as first:
        found = bench.measure(parsed, kinds, rounds, wanted)
    if not first:
        return
    if draw is not None:
        bench.draw(found, draw, bench_options.describe_machine(machine))
    if json:
        style.print_json({"machine": machine, "ranks": ranks, "rounds": rounds, **found.as_json()})
        return
    _print(found, ranks, bench_options.describe_machine(machine))


def _print(found: Found, ranks: int, machine: str) -> None:
    columns = ("contender", "µs", "/ hand-written", "products", "/ shardgrad")
    for dtype, size in dict.fromkeys((row.dtype, row.size) for row in found.rows):
        rows = [
            (
                f"{row.name}, {row.backend}" if row.backend else row.name,
                row.time.text(),
                row.to_hand.text(2) if row.to_hand else "–",
                f"{row.share.median:.0%}" if row.share else "–",
                f"{row.to_ours.median:.2f}" if row.to_ours else "–",
            )
            for row in found.rows
            if (row.dtype, row.size) == (dtype, size)
        ]
        style.table(
            columns,
            rows,
            title=f"{dtype} {list(size)}, {ranks} ranks",
            numbers=columns[1:],
            dispensable=("products", "/ shardgrad"),
        )
    against = [
        (f"{name}, {backend}", f"{same:.2f}", "–" if on_shm is None else f"{on_shm:.2f}")
        for (name, backend), (same, on_shm) in found.against().items()
    ]
    means = ("contender", "/ shardgrad", "/ shardgrad, shm")
    style.table(means, against, title="time / shardgrad's, geometric means", numbers=means[1:])
    for text in ("products: their share of a step.", *found.left_out, machine):
        style.say(text)
