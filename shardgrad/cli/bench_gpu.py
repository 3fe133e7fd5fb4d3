"""`shardgrad bench gpu`: the products of one tensor parallel rank of a 70B model, on one GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from shardgrad.cli import bench_options, options, style

EPILOG = style.examples("shardgrad bench gpu", "shardgrad bench gpu --tokens 2048 --json")


def gpu(
    tokens: Annotated[int, typer.Option(min=1, help="rows of X")] = 4096,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32")] = "bf16",
    rounds: options.Rounds = 21,
    json: options.Json = False,
) -> None:
    """Time forward + backward of each product of Llama 70B at its local size under 8 tensor parallel ranks, on one GPU,
    as the first of eight on the `fake` backend, which sends nothing: beside plain nn.Linear, and as a share of the
    chip's rate on a large product. One step of what launch/gpu_check.sh finds out.
    """
    kind = bench_options.read_dtypes(dtype)[0]
    import torch

    if not torch.cuda.is_available():
        raise style.refuse("torch sees no CUDA device here")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from shardgrad.bench import gpu as bench
    from shardgrad.comm import shim

    name = torch.cuda.get_device_name()
    shim.join_imagined(0, bench.RANKS)
    try:
        mesh = init_device_mesh("cuda", (bench.RANKS,), mesh_dim_names=("tp",))
        rate, rows = bench.measure(bench.llama_70b(), tokens, mesh, kind, rounds)
    finally:
        dist.destroy_process_group()
    if json:
        style.print_json({"device": name, "torch": torch.__version__, "dtype": dtype, **bench.as_json(rate, rows)})
        return
    columns = ("product", "nn.Linear", "shardgrad", "/ nn.Linear", "of the chip's rate", "main_grad", "unfused")
    table = [
        (
            row.name,
            row.plain.text(),
            row.time.text(),
            row.to_plain.text(3),
            f"{row.of_rate.median:.0%}",
            f"{row.main_grad.median:,.0f}",
            f"{row.unfused.median:,.0f}",
        )
        for row in rows
    ]
    style.table(
        columns,
        table,
        title=f"µs, {tokens} tokens, {dtype}",
        numbers=columns[1:],
        dispensable=("unfused", "main_grad", "nn.Linear"),
    )
    style.say(f"{name}, torch {torch.__version__}; a product of 8192 × 8192 × 8192 runs at {rate / 1e12:,.1f} TFLOP/s")
