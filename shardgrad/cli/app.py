"""The list of commands. A command's module imports torch and the rooms it needs when it runs, so `--help` is quick."""

from __future__ import annotations

import typer

from shardgrad.cli import explain, verify

app = typer.Typer(
    name="shardgrad",
    help="Sharded matrix products whose backward is derived from how the tensors are stored.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="explain")(explain.explain)
app.command(name="verify")(verify.verify)


@app.callback()
def _root() -> None:
    """A callback, so that typer keeps subcommands even while there is one."""
