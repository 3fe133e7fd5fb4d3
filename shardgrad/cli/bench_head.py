"""`shardgrad bench head`: the product to a vocabulary and its loss in one, beside logits that exist at once."""

from __future__ import annotations

from typing import Annotated

import typer

from shardgrad.cli import bench_options, options, style
from shardgrad.cli import ranks as processes

EPILOG = style.examples(
    "shardgrad bench head",
    "shardgrad bench head --ranks 1 --sizes 2048x1024x50000 --dtypes fp32 --rounds 3",
)


def head(
    sizes: Annotated[str, typer.Option(help="tokens × features × words, separated by commas")] = "8192x512x32000",
    dtypes: options.Dtypes = "fp32,bf16",
    rounds: Annotated[int, typer.Option(min=0, help="how often every contender has its turn; 0: no times")] = 5,
    ranks: Annotated[int, typer.Option(min=1, help="processes of this machine")] = 2,
    json: options.Json = False,
    draw: options.Draw = None,
) -> None:
    """Measure the loss of a head's product, forward and backward: peak memory above x, W, dX and dW, and time, with the
    logits at once, in chunks by shardgrad, by hand and, on one rank, by torch.

    All in the same processes, in turns. Brackets are 95 % confidence intervals of medians.
    """
    parsed = bench_options.read_sizes(sizes, ranks)
    kinds = bench_options.read_dtypes(dtypes)
    style.check_file(draw)
    bench_options.quiet_profiler()
    processes.start(ranks)

    from shardgrad.bench import head as bench

    machine = bench_options.machine()
    with processes.joined() as first:
        rows = list(bench.measure(parsed, kinds, rounds))
    if not first:
        return
    if draw is not None:
        bench.draw(rows, draw, bench_options.describe_machine(machine))
    if json:
        found = {"machine": machine, "ranks": ranks, "rounds": rounds, "rows": [row.as_json() for row in rows]}
        style.print_json(found)
        return
    columns = ("contender", "peak, MB", "/ at once", "s", "/ at once ")
    for dtype, size in dict.fromkeys((row.dtype, row.size) for row in rows):
        style.table(
            columns,
            [
                (
                    row.name,
                    f"{row.peak / 1e6:,.0f}",
                    f"{row.peak_ratio:.3f}",
                    row.time.text(2) if row.time else "–",
                    row.time_ratio.text(2) if row.time_ratio else "–",
                )
                for row in rows
                if (row.dtype, row.size) == (dtype, size)
            ],
            title=f"{dtype} {list(size)}, ranks: {ranks}",
            numbers=columns[1:],
            dispensable=("s",),
        )
    style.say(bench_options.describe_machine(machine))
