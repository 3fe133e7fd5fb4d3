"""`shardgrad explain`: what each phase of a layout computes and communicates."""

from __future__ import annotations

from typing import Annotated

import typer


def explain(
    layout: Annotated[
        str, typer.Argument(help="a layout, such as 'X[n,d] W[d,m/tp] -> Y[n,m/tp]', or a preset's name")
    ],
) -> None:
    """Print what each phase of a layout computes and communicates.

    Example: `shardgrad explain 'X[n,d] W[d,m/tp] -> Y[n,m/tp]'`
    """
    from shardgrad.errors import LayoutError
    from shardgrad.layout import PRESETS, Layout

    try:
        typer.echo(PRESETS[layout].explain() if layout in PRESETS else Layout(layout).explain())
    except LayoutError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
