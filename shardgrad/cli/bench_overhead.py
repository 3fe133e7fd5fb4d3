"""`shardgrad bench overhead`: what the host does for a step besides the products."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from shardgrad.cli import bench_options, options, style

EPILOG = style.examples("shardgrad bench overhead", "shardgrad bench overhead --rounds 1000 --json")


def overhead(
    rounds: Annotated[int, typer.Option(min=6, help="how often every contender has its turn, of about 1 ms")] = 800,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, …")] = "fp32",
    json: options.Json = False,
) -> None:
    """Time forward + backward of Linear–GELU–Linear at [8, 64, 256] as the first of two ranks on the `fake` backend,
    which sends nothing and waits for nothing: products and host work alone.

    Ratios are of the thread's processor time, round by round, so that other programs' load hardly touches them.
    """
    kinds = bench_options.read_dtypes(dtype)
    import torch

    from shardgrad.bench import overhead as bench
    from shardgrad.bench import peers

    torch.set_num_threads(1)
    peers.warnings_off()
    machine = bench_options.machine()
    notes = [text for name in peers.PEERS if (text := peers.missing(name))]
    rows = bench.measure([name for name in peers.PEERS if peers.missing(name) is None], rounds, kinds[0])
    if json:
        style.print_json({"machine": machine, "unit": "µs", "rows": [asdict(row) for row in rows], "notes": notes})
        return
    columns = ("contender", "wall", "processor", "least", "/ plain", "/ hand-written")
    table = [
        (r.name, r.wall.text(), r.cpu.text(), f"{r.least:,.1f}", r.to_plain.text(3), r.to_hand.text(3)) for r in rows
    ]
    style.table(columns, table, title="µs a step, host alone", numbers=columns[1:], dispensable=("wall", "processor"))
    style.say(
        "plain: the local products as two nn.Linear. Medians of rounds [95 % confidence]; least: of processor time."
    )
    least = {row.name: row.least for row in rows}
    mine, plain, hand = (least[name] for name in (peers.OURS, peers.LOCAL, peers.HAND))
    style.say(
        f"Of the least, shardgrad's is {mine / plain:.2f} times plain's and {mine / hand:.2f} times the hand-written."
    )
    for text in (*notes, bench_options.describe_machine(machine)):
        style.say(text)
