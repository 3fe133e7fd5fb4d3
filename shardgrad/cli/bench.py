"""`shardgrad bench …`: measurements, each a table, and a picture or JSON on request."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from shardgrad.cli import bench_gpu, bench_model, bench_overhead, bench_overlap, bench_step
from shardgrad.cli import ranks as start_ranks

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.command(name="step", epilog=bench_step.EPILOG)(bench_step.step)
app.command(name="overhead", epilog=bench_overhead.EPILOG)(bench_overhead.overhead)
app.command(name="model", epilog=bench_model.EPILOG)(bench_model.model)
app.command(name="overlap", epilog=bench_overlap.EPILOG)(bench_overlap.overlap)
app.command(name="gpu", epilog=bench_gpu.EPILOG)(bench_gpu.gpu)

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@app.callback()
def _root() -> None:
    """A callback, so that typer keeps subcommands even while there is one."""


@app.command()
def collectives(
    ranks: Annotated[int, typer.Option(min=2, help="processes of this machine")] = 2,
    operations: Annotated[str, typer.Option(help="which, separated by commas")] = (
        "all-reduce,all-gather,reduce-scatter,all-to-all,broadcast,barrier"
    ),
    sizes: Annotated[str, typer.Option(help="of the tensors, separated by commas")] = "2KiB,64KiB,512KiB,8MiB",
    turns: Annotated[int, typer.Option(min=1, help="how often gloo and shm take turns at each size")] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
    picture: Annotated[Path | None, typer.Option(help="also draw the times into this file")] = None,
) -> None:
    """Compare gloo with shared memory: medians in microseconds, and how many times faster shared memory is.

    Both are measured in the same processes, in turns. Example: `shardgrad bench collectives --ranks 4`
    """
    wanted = operations.split(",")
    parsed = [_size(text) for text in sizes.split(",")]
    _check_operations(wanted)
    start_ranks.start(ranks)
    import torch.distributed as dist
    from rich.console import Console
    from rich.table import Table

    from shardgrad.bench import collectives as bench

    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    try:
        rows = bench.measure(wanted, parsed, turns, lambda row: None)
    finally:
        dist.destroy_process_group()
    if not first:
        return
    if picture is not None:
        bench.draw(rows, str(picture))
    if as_json:
        typer.echo(json.dumps(bench.as_json(rows), indent=1))
        return
    table = Table(title=f"{rows[0].ranks} ranks, float32, medians in µs")
    table.add_column("operation")
    for name in ("size", "gloo", "shm", "times faster"):
        table.add_column(name, justify="right")
    for row in rows:
        size = bench.size_text(row.bytes) if row.bytes else "–"
        table.add_row(row.operation, size, f"{row.gloo:,.0f}", f"{row.shm:,.0f}", f"{row.ratio:.1f}")
    Console().print(table)


def _size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is no size: write 4096, 2KiB or 8MiB", param_hint="--sizes")
    return int(match[1]) * _UNITS[match[2]]


def _check_operations(names: list[str]) -> None:
    from shardgrad.bench.collectives import OPERATIONS

    for name in names:
        if name not in OPERATIONS:
            known = ", ".join(OPERATIONS)
            raise typer.BadParameter(f"{name!r} is not one of {known}", param_hint="--operations")
