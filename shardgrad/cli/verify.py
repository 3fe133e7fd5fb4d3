"""`shardgrad verify`: one step of a training configuration's run against one device."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from shardgrad.cli import options, style
from shardgrad.cli import ranks as processes

EPILOG = style.examples(
    "shardgrad verify configs/quickstart.yaml train.batch=2 --ranks 3",
    "shardgrad verify configs/gpt2-124M.yaml mesh.device=cpu model.layers=1 model.d_model=48 model.seq_len=16 "
    "train.batch=16",
)
_PATIENCE = timedelta(minutes=30)  # for a rank that still computes its runs of one device, which others wait for


def verify(
    config: options.Config = None,
    overrides: options.Overrides = None,
    ranks: options.RanksOfMesh = None,
    json: options.Json = False,
    draw: options.Draw = None,
    rows: Annotated[int, typer.Option(min=1, help="tensors to list, worst first")] = 20,
) -> None:
    """Hold one step of a configuration's run against one device, tensor by tensor.

    The model is the run's: its mesh, its storage, its vocabulary, its dtypes, its micro-batches, its AdamW. Nothing is
    dropped, and tokens are random. Each rank also computes the whole step on one device, in float64 as well: make a
    large configuration small by overrides. Ends with status 0 if every tensor differs by rounding alone, 1 if not, 2 if
    the configuration cannot be used.
    """
    if config is None:
        from shardgrad import shipped

        style.list_shipped(shipped.names(), "what it trains")
        return
    style.check_file(draw)
    read, ranks = processes.configured(config, overrides, ranks)
    from shardgrad.errors import LayoutError, ShapeError
    from shardgrad.train.config import ConfigError
    from shardgrad.train.data import DataError
    from shardgrad.train.verify import check

    with style.exit_on(ConfigError, DataError):
        read = check(read, ranks)
    processes.start(ranks)

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from shardgrad.comm.backend import choose
    from shardgrad.comm.rendezvous import start_process_group
    from shardgrad.train.build import mesh_shape
    from shardgrad.train.verify import verify_run
    from shardgrad.verification.picture import draw as draw_report

    watch = start_process_group(choose(read.mesh.device), _PATIENCE)
    first = dist.get_rank() == 0
    shape = mesh_shape(read)
    mesh = init_device_mesh(read.mesh.device, tuple(shape.values()), mesh_dim_names=tuple(shape))

    def progress(text: str) -> None:
        if first:
            typer.echo(text, err=True)

    try:
        report = verify_run(read, mesh, progress)
    except (ConfigError, LayoutError, ShapeError) as error:  # the model cannot be sharded so: alike on every rank
        watch.tell(str(error))
        progress(str(error))
        status = 2
    else:
        watch.leave()
        status = 0 if report.ok else 1
        if first and json:
            typer.echo(report.to_json())
        elif first:
            report.show(style.console(), rows)
        if first and draw is not None:
            draw_report(report, draw)
    dist.destroy_process_group()
    processes.end(status)
