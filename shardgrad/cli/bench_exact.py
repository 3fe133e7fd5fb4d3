"""`shardgrad bench exact`: what exact mode costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardgrad.cli import bench_options, options, style
from shardgrad.cli import ranks as processes

if TYPE_CHECKING:
    from shardgrad.bench.exact import Row

EPILOG = style.examples(
    "shardgrad bench exact",
    "shardgrad bench exact --sizes 512x1024x4096 --dtypes bf16 --pieces 8 --model none --draw exact.png",
)


def exact(
    sizes: Annotated[str, typer.Option(help="of products: tokens × features × hidden features, by commas")] = (
        "64x256x1024,256x512x2048"
    ),
    dtypes: Annotated[str, typer.Option(help="of products: fp32, bf16, …, separated by commas")] = "fp32,bf16",
    pieces: Annotated[str, typer.Option(help="V, separated by commas")] = "2,4,8",
    model: Annotated[str, typer.Option(help="of the training step: llama, gpt or none")] = "llama",
    d_model: Annotated[int, typer.Option(min=1)] = 256,
    rounds: options.Rounds = 11,
    ranks: options.Ranks = 2,
    backend: Annotated[str, typer.Option(help="gloo or shm")] = "shm",
    json: options.Json = False,
    draw: options.Draw = None,
) -> None:
    """Time products (forward + backward) and a training step (forward, backward, clipping, AdamW) in exact mode, beside
    the same without it: V pieces on every p ranks that divide them. Fails, with status 1, if exact mode sends more
    bytes or holds more partial sums than it promises.

    All in the same processes, in turns. Brackets are 95 % confidence intervals of medians.
    """
    counts = _read_pieces(pieces)
    parsed = bench_options.read_sizes(sizes, 1)
    for size in parsed:
        if any(size[at] % count for at in (0, 2) for count in counts):
            raise style.refuse(f"{'x'.join(map(str, size))}: every number of pieces divides tokens and hidden features")
    kinds = bench_options.read_dtypes(dtypes)
    how = bench_options.read_one(backend, ("gloo", "shm"), "backends")
    which = bench_options.read_one(model, ("llama", "gpt", "none"), "models")
    heads = max(8, *counts)
    if which != "none" and (d_model % (2 * heads) or any(heads % count for count in counts)):
        raise style.refuse(f"d-model {d_model} must be a multiple of {2 * heads}, and pieces must divide {heads} heads")
    style.check_file(draw)
    processes.start(ranks)

    from shardgrad.bench import exact as bench
    from shardgrad.bench.model import Shape

    machine = bench_options.machine()
    shape = Shape(d_model=d_model, heads=heads, seq_len=64, batch=4)
    with processes.joined() as first:
        rows = bench.measure(
            parsed, kinds, counts, rounds, backend=how, model=None if which == "none" else which, shape=shape
        )
    broken = bench.broken(rows)
    if first:
        if draw is not None:
            bench.draw(rows, draw, bench_options.describe_machine(machine))
        if json:
            made = {"machine": machine, "unit": "ms", "backend": how, "model": which, "rows": bench.as_json(rows)}
            style.print_json({**made, "broken": broken})
        else:
            _print(rows, how, which, bench_options.describe_machine(machine))
        for text in broken:
            typer.echo(text, err=True)
    if broken:
        processes.end(1)


def _read_pieces(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise style.refuse(f"{text!r} are no numbers of pieces: write 2,4,8")
    return sorted({int(part) for part in parts})


def _print(rows: list[Row], backend: str, model: str, machine: str) -> None:
    columns = ("part", "V", "p", "ordinary ms", "exact ms", "exact / ordinary", "of cpu", "KiB sent", "sums held")
    for dtype, size, step in dict.fromkeys((row.dtype, row.size, row.part == "training step") for row in rows):
        table = [
            (
                row.part if row.sends else f"{row.part}, alone",
                str(row.pieces),
                str(row.ranks),
                f"{row.ordinary.median:,.2f}",
                f"{row.exact.median:,.2f}",
                row.time.text(2),
                f"{row.cpu.median:.2f}",
                f"{row.bytes[1] / 1024:,.1f}" if row.sends else "–",
                str(row.most),
            )
            for row in rows
            if (row.dtype, row.size, row.part == "training step") == (dtype, size, step)
        ]
        title = f"{model}, [sequences, length, d]" if step else "[n, d, m]"
        style.table(
            columns,
            table,
            title=f"{dtype} {title} = {list(size)}, {backend}",
            numbers=columns[1:],
            dispensable=("sums held", "KiB sent", "of cpu"),
        )
    style.say(
        "alone: one rank, without communication, does what one of p ranks does: their local sizes in V/p pieces (casts "
        "of sums that only several ranks need are not in it). of cpu: the same ratio, of processor time."
    )
    for row in (row for row in rows if row.part == "training step" and row.ranks > 1):
        style.say(
            f"V = {row.pieces}, p = {row.ranks}: forward and backward send {row.bytes[1]:,} bytes, ordinary "
            f"{row.bytes[0]:,}; clipping {row.clip[1]:,}, ordinary {row.clip[0]:,}."
        )
    style.say(machine)
