"""The list of commands. A command's module imports torch and the rooms it needs when it runs, so `--help` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

import shardgrad
from shardgrad.cli import bench, chaos, explain, mutants, scale, style, trace, train, verify

app = style.App(
    name="shardgrad",
    help="Sharded matrix products whose backward is derived from how the tensors are stored.",
    cls=style.Group,
    invoke_without_command=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="train", epilog=train.EPILOG)(train.train)
app.command(name="explain", epilog=explain.EPILOG)(explain.explain)
app.command(name="scale", epilog=scale.EPILOG)(scale.scale)
app.command(name="trace", epilog=trace.EPILOG)(trace.trace)
app.command(name="verify", epilog=verify.EPILOG)(verify.verify)
app.command(name="mutants", epilog=mutants.EPILOG)(mutants.mutants)
app.command(name="chaos", epilog=chaos.EPILOG)(chaos.chaos)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(shardgrad.__version__)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    style.help_if_alone(context)
