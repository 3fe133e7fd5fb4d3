"""The list of commands. A command's module imports torch and the rooms it needs when it runs, so `--help` is quick."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from shardgrad.cli import bench, chaos, explain, mutants, scale, trace, train, verify

app = typer.Typer(
    name="shardgrad",
    help="Sharded matrix products whose backward is derived from how the tensors are stored.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="train", epilog=train.EPILOG)(train.train)
app.command(name="explain", epilog=explain.EPILOG)(explain.explain)
app.command(name="scale", epilog=scale.EPILOG)(scale.scale)
app.command(name="trace", epilog=trace.EPILOG)(trace.trace)
app.command(name="verify", epilog=verify.EPILOG)(verify.verify)
app.command(name="mutants")(mutants.mutants)
app.command(name="chaos")(chaos.chaos)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("shardgrad"))
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    """A callback, so that typer keeps subcommands even while there is one."""
