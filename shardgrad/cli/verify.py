"""`shardgrad verify`: a training configuration's model, sharded, against one device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from shardgrad.cli import ranks as started


def verify(
    config: Annotated[Path, typer.Argument(help="a training configuration, such as configs/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="values instead of the file's: section.key=value")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="processes to shard over")] = 2,
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], typer.Option(help="the working precision")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    picture: Annotated[Path | None, typer.Option(help="write a picture of the errors (.png, .svg or .pdf)")] = None,
    rows: Annotated[int, typer.Option(min=1, help="tensors to list, worst first")] = 20,
    seed: Annotated[int, typer.Option(help="of the values and the tokens")] = 0,
) -> None:
    """Hold one step of a configuration's model, sharded over ranks, against one device.

    Ends with status 0 if every tensor differs by rounding alone, 1 if not, 2 if the configuration cannot be used.

    Example: `shardgrad verify configs/quickstart.yaml train.batch=2 --ranks 3`
    """
    from shardgrad.train.config import ConfigError, decoder_sizes, load

    try:
        read = load(config, overrides or [])
        sizes = decoder_sizes(read)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    started.start(ranks)

    import torch
    import torch.distributed as dist
    from rich.console import Console
    from torch.distributed.device_mesh import init_device_mesh

    import shardgrad as sg
    from shardgrad.train.build import build, build_reference
    from shardgrad.train.config import Mesh
    from shardgrad.train.data import BYTES
    from shardgrad.train.reference import name_here
    from shardgrad.verification.picture import draw

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(seed)
    # Tensor parallel over all ranks, whatever the run's mesh; nothing dropped, as in the reference.
    read = read.model_copy(update={"mesh": Mesh(), "model": sizes.model_copy(update={"dropout": 0.0})})
    report = sg.verify(
        build(read, BYTES, mesh, getattr(torch, dtype)),
        build_reference(sizes, BYTES),
        [torch.randint(0, BYTES, (read.train.batch, read.model.seq_len)) for _ in range(2)],
        mesh,
        loss=lambda model, ids, targets: model.loss(ids, targets),
        names=name_here,
        seed=seed,
    )
    if dist.get_rank() == 0:
        if json:
            typer.echo(report.to_json())
        else:
            report.show(Console(highlight=False, width=None if sys.stdout.isatty() else 100), rows)
        if picture is not None:
            draw(report, picture)
    dist.destroy_process_group()
    started.end(0 if report.ok else 1)
