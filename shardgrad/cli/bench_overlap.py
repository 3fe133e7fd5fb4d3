"""`shardgrad bench overlap`: how much communication hides behind products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardgrad.cli import bench_options, options, style
from shardgrad.cli import ranks as processes

if TYPE_CHECKING:
    from shardgrad.bench.timing import Spread

EPILOG = style.examples(
    "shardgrad bench overlap", "shardgrad bench overlap --sizes 512x1024x4096 --dtypes fp32 --rounds 21"
)


def overlap(
    sizes: options.Sizes = "256x512x2048,512x1024x4096",
    dtypes: options.Dtypes = "fp32",
    rounds: options.Rounds = 11,
    ranks: Annotated[
        int, typer.Option(min=2, help="processes of this machine; ignored where a launcher set WORLD_SIZE")
    ] = 2,
    backend: Annotated[str, typer.Option(help="gloo or shm")] = "gloo",
    json: options.Json = False,
    draw: options.Draw = None,
) -> None:
    """Time products alone, communication alone, and both in one call; the share of what could be hidden that was. With
    whole products, with `sg.set_overlap(mesh, sg.measure_costs(mesh))`, and in DTensor, fairscale and Megatron-core.

    Under a launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, on other hosts too, it runs as that rank.
    """
    ranks = processes.count() or ranks
    parsed = bench_options.read_sizes(sizes, ranks, tokens_too=True)
    kinds = bench_options.read_dtypes(dtypes)
    how = bench_options.read_one(backend, ("gloo", "shm"), "backends")
    style.check_file(draw)
    processes.start(ranks)

    from shardgrad.bench import overlap as bench

    machine = bench_options.machine()
    with processes.joined() as first:
        rows, costs = bench.measure(parsed, kinds, rounds, how)
    if not first:
        return
    if draw is not None:
        bench.draw(rows, draw, bench_options.describe_machine(machine))
    if json:
        style.print_json({"machine": machine, "backend": how, **bench.as_json(rows, costs)})
        return
    columns = ("contender", "products", "to hide", "comm.", "together", "hidden", "not waited for")
    for dtype, size, case in dict.fromkeys((row.dtype, row.size, row.case) for row in rows):
        table = [
            (
                row.name,
                f"{row.products.median:,.0f}",
                f"{row.could.median:,.0f}",
                f"{row.communication.median:,.0f}",
                f"{row.together.median:,.0f}",
                _share(row.hidden),
                _share(row.unwaited),
            )
            for row in rows
            if (row.dtype, row.size, row.case) == (dtype, size, case)
        ]
        title = f"{case}: {dtype} {list(size)}, {ranks} ranks, {how}, medians in µs"
        style.table(columns, table, title=title, numbers=columns[1:], dispensable=("not waited for", "to hide"))
    style.say(
        "to hide: those of the products beside which communication can run; hidden: the share of what could be hidden "
        "that was; not waited for: the same share, by the time that the calls were blocked (shardgrad's own calls only)"
    )
    for axis, link in costs.links.items():
        style.say(
            f"measured of {axis}: {1e6 * link.latency:,.0f} µs for the smallest all-reduce, "
            f"{1e-6 / link.seconds_per_byte:,.0f} MB/s of what a rank sends, "
            f"{link.hidden:.0%} vanishes beside a product"
        )
    style.say(bench_options.describe_machine(machine))


def _share(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.median:.0%} [{spread.low:.0%}, {spread.high:.0%}]"
