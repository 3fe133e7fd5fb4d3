"""`shardgrad bench …`: measurements, each a table, and a picture or JSON on request."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from shardgrad.cli import (
    bench_exact,
    bench_gpu,
    bench_head,
    bench_model,
    bench_options,
    bench_overhead,
    bench_overlap,
    bench_step,
    options,
    style,
)
from shardgrad.cli import ranks as start_ranks

app = style.App(cls=style.Group, help="Measure on this machine.", invoke_without_command=True)
app.command(name="step", epilog=bench_step.EPILOG)(bench_step.step)
app.command(name="overhead", epilog=bench_overhead.EPILOG)(bench_overhead.overhead)
app.command(name="model", epilog=bench_model.EPILOG)(bench_model.model)
app.command(name="overlap", epilog=bench_overlap.EPILOG)(bench_overlap.overlap)
app.command(name="exact", epilog=bench_exact.EPILOG)(bench_exact.exact)
app.command(name="head", epilog=bench_head.EPILOG)(bench_head.head)
app.command(name="gpu", epilog=bench_gpu.EPILOG)(bench_gpu.gpu)

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@app.callback()
def _root(context: typer.Context) -> None:
    style.help_if_alone(context)


@app.command(
    epilog=style.examples(
        "shardgrad bench collectives",
        "shardgrad bench collectives --ranks 4 --operations all-reduce,barrier --sizes 2KiB --draw times.svg",
    ),
)
def collectives(
    ranks: options.Ranks = 2,
    operations: Annotated[str, typer.Option(help="which, separated by commas")] = (
        "all-reduce,all-gather,reduce-scatter,all-to-all,broadcast,barrier"
    ),
    sizes: Annotated[str, typer.Option(help="of the tensors, separated by commas")] = "2KiB,64KiB,512KiB,8MiB",
    turns: Annotated[int, typer.Option(min=1, help="how often gloo and shm take turns at each size")] = 15,
    as_json: options.Json = False,
    draw: options.Draw = None,
) -> None:
    """Compare gloo with shared memory: medians in microseconds, and how many times faster shared memory is.

    Both are measured in the same processes, in turns.
    """
    wanted = operations.split(",")
    parsed = [_size(text) for text in sizes.split(",")]
    _check_operations(wanted)
    style.check_file(draw)
    start_ranks.start(ranks)

    from shardgrad.bench import collectives as bench

    machine = bench_options.machine()
    with start_ranks.joined() as first:
        rows = bench.measure(wanted, parsed, turns, lambda row: None)
    if not first:
        return
    if draw is not None:
        bench.draw(rows, draw, bench_options.describe_machine(machine))
    if as_json:
        style.print_json(bench.as_json(rows))
        return
    numbers = ("size", "gloo", "shm", "times faster")
    style.table(
        ("operation", *numbers),
        [
            (
                row.operation,
                bench.size_text(row.bytes) if row.bytes else "–",
                f"{row.gloo:,.0f}",
                f"{row.shm:,.0f}",
                f"{row.ratio:.1f}",
            )
            for row in rows
        ],
        title=f"{rows[0].ranks} ranks, float32, medians in µs",
        numbers=numbers,
    )
    style.say(bench_options.describe_machine(machine))


@app.command(
    epilog=style.examples("shardgrad bench memory", "shardgrad bench memory --sizes s=512,b=1,h=512,a=8 --ranks 1,4"),
)
def memory(
    sizes: Annotated[
        list[str] | None, typer.Option(help="s, b, h and a of a block, as s=128,b=2,h=256,a=4; may stand several times")
    ] = None,
    ranks: Annotated[str, typer.Option(help="how many tensor parallel ranks, separated by commas")] = "1,2,4,8",
    as_json: options.Json = False,
) -> None:
    """Count what a transformer block keeps for backward on one rank, in bfloat16, against published formulas.

    One process: nothing is communicated.
    """
    from dataclasses import asdict, replace

    from shardgrad.bench import memory as bench

    example = "s=128,b=2,h=256,a=4"
    wanted: list[bench.Sizes] = []
    skipped: list[bench.Sizes] = []
    for text in sizes or [example]:
        pairs = style.read_pairs(text, example)
        if set(pairs) != set("sbha") or not all(pairs.values()):
            raise style.refuse(f"{text!r} does not give s, b, h and a, as {example}", "--sizes")
        for count in ranks.split(","):
            x = bench.Sizes(**pairs, t=_count(count))
            divided = not (x.h % x.a or x.a % x.t or x.s % x.t)
            (wanted if divided else skipped).append(x)
    left_out = "; ".join(f"s={x.s}, b={x.b}, h={x.h}, a={x.a} on {x.t} ranks" for x in skipped)
    if not wanted:
        raise style.refuse(f"the formulas are of sizes that divide, which none do: {left_out}", "--sizes")
    rows = bench.measure(wanted)
    if as_json:
        listed = [asdict(row) for row in rows]
        style.print_json([{**row.pop("sizes"), **row} for row in listed])
        return
    numbers = ("counted", "expected", "paper", "/ paper")
    for sizes_of in dict.fromkeys(replace(row.sizes, t=1) for row in rows):
        style.table(
            ("t", "sharded", "computed again", *numbers),
            [
                (
                    str(row.sizes.t),
                    row.scheme,
                    row.recompute,
                    f"{row.counted:,}",
                    f"{row.expected:,.0f}",
                    f"{row.paper:,.0f}",
                    f"{row.counted / row.paper:.3f}",
                )
                for row in rows
                if replace(row.sizes, t=1) == sizes_of
            ],
            title=f"bytes that a rank of t keeps for the backward of a block: s={sizes_of.s}, b={sizes_of.b}, "
            f"h={sizes_of.h}, a={sizes_of.a}",
            numbers=("t", *numbers),
            dispensable=("expected",),
        )
    if skipped:
        style.say(f"left out, for the formulas are of sizes that divide: {left_out}")


@app.command(
    name="bytes",
    epilog=style.examples(
        "shardgrad bench bytes", "shardgrad bench bytes --sizes n=65536,d=1024,m=4096 --ranks 16,64 --draw bytes.svg"
    ),
)
def bytes_sent(
    sizes: Annotated[
        list[str] | None, typer.Option(help="n, d and m of a product, as n=4096,d=1024,m=1024; may stand several times")
    ] = None,
    ranks: Annotated[str, typer.Option(help="how many ranks, separated by commas")] = "4,16,64,256",
    as_json: options.Json = False,
    draw: options.Draw = None,
) -> None:
    """Compare what layouts send for Y, dX and dW with the least that any layout of P-th parts can send.

    Nothing is run: the layouts say it.
    """
    from dataclasses import asdict

    from shardgrad.bench import bytes as bench

    example = "n=4096,d=1024,m=1024"
    wanted = []
    for text in sizes or ["n=4096,d=4096,m=4096", "n=65536,d=1024,m=4096"]:
        pairs = style.read_pairs(text, example)
        if set(pairs) != set("ndm") or not all(pairs.values()):
            raise style.refuse(f"{text!r} does not give n, d and m, as {example}", "--sizes")
        wanted.append((pairs["n"], pairs["d"], pairs["m"]))
    style.check_file(draw)
    rows = bench.rows(wanted, [_count(text) for text in ranks.split(",")])
    if draw is not None:
        bench.draw(rows, draw)
    if as_json:
        style.print_json([{**asdict(row), "ratios": row.ratios} for row in rows])
        return
    numbers = ("Y", "dX", "dW", "stored × P")
    for n, d, m, count, least in dict.fromkeys((row.n, row.d, row.m, row.ranks, row.least) for row in rows):
        style.table(
            ("layout", "grid", *numbers, "over the bound"),
            [
                (
                    row.layout,
                    "×".join(map(str, row.grid.values())),
                    *(f"{row.words[phase]:,}" for phase in bench.PHASES),
                    f"{row.stored:.2f}",
                    " ".join(f"{ratio:.2f}" for ratio in row.ratios.values()) if row.ratios else "replicates",
                )
                for row in rows
                if (row.n, row.d, row.m, row.ranks) == (n, d, m, count)
            ],
            title=f"n={n}, d={d}, m={m}: elements that one of P={count} ranks sends; the bound: {least:,.0f}",
            numbers=numbers,
            dispensable=("grid", "stored × P"),
        )
    style.say("over the bound: Y, dX, dW; stored × P: of X, W and Y, over one P-th of them.")


def _count(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise style.refuse(f"{text!r} is no number of ranks", "--ranks")
    return int(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise style.refuse(f"{text!r} is no size: write 4096, 2KiB or 8MiB", "--sizes")
    return int(match[1]) * _UNITS[match[2]]


def _check_operations(names: list[str]) -> None:
    from shardgrad.bench.collectives import OPERATIONS

    for name in names:
        if name not in OPERATIONS:
            known = ", ".join(OPERATIONS)
            raise style.refuse(f"{name!r} is not one of {known}", "--operations")
