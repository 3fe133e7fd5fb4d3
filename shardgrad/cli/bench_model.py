"""`shardgrad bench model`: a GPT's block and training step on one rank and on several."""

from __future__ import annotations

from typing import Annotated

import typer

from shardgrad.cli import bench_options, options, style
from shardgrad.cli import ranks as processes

EPILOG = style.examples("shardgrad bench model", "shardgrad bench model --d-model 512 --dtype bf16 --backend gloo")


def model(
    layers: Annotated[int, typer.Option(min=1)] = 2,
    d_model: Annotated[int, typer.Option(min=1)] = 256,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    seq_len: Annotated[int, typer.Option(min=1)] = 128,
    batch: Annotated[int, typer.Option(min=1, help="sequences")] = 8,
    vocab: Annotated[int, typer.Option(min=1)] = 512,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, …")] = "fp32",
    rounds: Annotated[int, typer.Option(min=1, help="how often each has its turn")] = 15,
    ranks: Annotated[int, typer.Option(min=2, help="processes of this machine, compared with one")] = 2,
    backend: Annotated[str, typer.Option(help="gloo or shm")] = "shm",
    json: options.Json = False,
    draw: options.Draw = None,
) -> None:
    """Time a block (forward + backward) and a training step (and AdamW) of a GPT, tensor and sequence parallel, on one
    rank and on several, in turns; and the bytes of tensors at the height of a step (torch's allocator, by its profiler:
    parameters, gradients and the optimizer's state included, buffers of process groups not).
    """
    kind = bench_options.read_dtypes(dtype)[0]
    how = bench_options.read_one(backend, ("gloo", "shm"), "backends")
    if d_model % heads:
        raise style.refuse(f"d-model {d_model} is no multiple of {heads} heads")
    if seq_len % ranks:
        raise style.refuse(f"seq-len {seq_len} is no multiple of {ranks} ranks")
    style.check_file(draw)
    bench_options.quiet_profiler()
    processes.start(ranks)

    from shardgrad.bench import model as bench

    machine = bench_options.machine()
    with processes.joined() as first:
        rows = bench.measure(bench.Shape(layers, d_model, heads, seq_len, batch, vocab, kind), how, rounds)
    if not first:
        return
    if draw is not None:
        bench.draw(rows, draw, bench_options.describe_machine(machine))
    if json:
        style.print_json({"machine": machine, "unit": "ms", "backend": how, "rows": bench.as_json(rows)})
        return
    columns = ("part", "ranks", "ms", "tokens/s", "over one rank", "peak MiB")
    table = [
        (
            row.part,
            str(row.ranks),
            row.time.text(1),
            row.rate.text(),
            row.speedup.text(2),
            f"{row.peak / 2**20:,.1f}",
        )
        for row in rows
    ]
    style.table(columns, table, title=f"GPT, {how}", numbers=columns[1:], dispensable=("tokens/s", "peak MiB"))
    style.say(bench_options.describe_machine(machine))
