"""Arguments and options that several commands have, alike in each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    str | None,
    typer.Argument(
        help="a training configuration's file, or the name of a shipped one; none: list those", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="values instead of the file's")
]
RanksOfMesh = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="processes on this machine; if not given, as many as the mesh needs, of which an axis that is null has "
        "two",
        show_default=False,
    ),
]
Ranks = Annotated[int, typer.Option(min=2, help="processes of this machine")]
Sizes = Annotated[str, typer.Option(help="tokens × features × hidden features, separated by commas")]
Dtypes = Annotated[str, typer.Option(help="fp32, bf16, …, separated by commas")]
Rounds = Annotated[int, typer.Option(min=1, help="how often every contender has its turn")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Draw = Annotated[
    Path | None, typer.Option(metavar="FILE", help="also draw it: a .svg, .png or .pdf", show_default=False)
]
