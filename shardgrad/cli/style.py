"""One style for every command: tables that fit a terminal, JSON on request, errors in words with exit status 2."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.box import SIMPLE_HEAD as BOX
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shardgrad.files import PICTURES

F = TypeVar("F", bound=Callable[..., Any])

WIDTH = 100  # of what goes to a file or a pipe
_SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES = tuple(_SHORT.values())


def console(width: int | None = None) -> Console:
    """Standard output: as wide as the terminal, or `width` columns (100) where there is none."""
    return Console(highlight=False, width=width or (None if sys.stdout.isatty() else WIDTH))


def say(text: str, *, on: Console | None = None) -> None:
    """One paragraph, wrapped at the terminal's width; brackets are text, as layouts need them."""
    (on or console()).print(text, markup=False, soft_wrap=False)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    numbers: Sequence[str] = (),
    total: Sequence[str] = (),
    dispensable: Sequence[str] = (),
    on: Console | None = None,
) -> None:
    """Print a table. Cells are plain text; `numbers` are the columns set to the right; `total` is a last, ruled row.

    dispensable: columns to leave out, the first one first, until the others have room; a line below names them.
    """
    on = on or console()
    caption = ""
    if dispensable:
        rows = list(rows)
        kept, left_out = fit(
            {name: [row[at] for row in rows] for at, name in enumerate(columns)}, dispensable, on.width
        )
        columns, rows = list(kept), list(zip(*kept.values()))
        caption = f"left out for want of room: {', '.join(left_out)} (--json has all)" if left_out else ""
    made = Table(
        title=escape(title) if title else None, title_justify="left", title_style="bold", box=BOX, pad_edge=False
    )
    for at, column in enumerate(columns):
        right = column in numbers
        made.add_column(escape(column), justify="right" if right else "left", no_wrap=right or at == 0, overflow="fold")
    listed = list(rows)
    for at, row in enumerate(listed):
        made.add_row(*(escape(cell) for cell in row), end_section=bool(total) and at == len(listed) - 1)
    if total:
        made.add_row(*(escape(cell) for cell in total), style="bold")
    on.print(made)
    if caption:
        say(caption, on=on)


def fit(
    columns: Mapping[str, Sequence[str]], dispensable: Sequence[str], width: int
) -> tuple[dict[str, Sequence[str]], list[str]]:
    """The columns for which there is room, and what had to be left out, the first of `dispensable` first.

    columns: cells by heading, whose first line is the column's name; the first column is broken after commas.
    """
    kept = dict(columns)
    first = next(iter(kept))
    least = max(len(part) for text in kept[first] for part in _parts(text))
    left_out = []
    for name in dispensable:
        if least <= width - _others(kept):
            break
        heading = next((heading for heading in kept if heading.partition("\n")[0] == name), None)
        if heading is not None:
            del kept[heading]
            left_out.append(name)
    room = width - _others(kept)
    return {**kept, first: [_broken(text, room) for text in kept[first]]}, left_out


def _others(columns: Mapping[str, Sequence[str]]) -> int:
    """The width of all columns but the first."""
    _, *others = columns.items()
    return 2 + sum(3 + max(len(line) for text in (name, *cells) for line in text.split("\n")) for name, cells in others)


def _parts(text: str) -> list[str]:
    return re.split("(?<=,) ", text)


def _broken(text: str, width: int) -> str:
    lines = [""]
    for part in _parts(text):
        if lines[-1] and len(lines[-1]) + 1 + len(part) > width:
            lines.append(part)
        else:
            lines[-1] = f"{lines[-1]} {part}".strip()
    return "\n".join(lines)


def print_json(value: Any) -> None:
    """What `--json` prints: one value, indented, and nothing else on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Tell these errors on standard error, without a traceback, and end with status 2: the user can mend them."""
    try:
        yield
    except errors as error:
        typer.echo(_words(error), err=True)
        raise typer.Exit(2) from None


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot open {error.filename}: {error.strerror}"
    return str(error)


class _Plain:
    """Help that says what is typed (`--ranks N`), not of which Python type it is (`--ranks <int>`)."""

    def get_params(self, context: Any) -> list[Any]:
        found: list[Any] = super().get_params(context)  # type: ignore[misc]
        for one in found:
            if one.param_type_name == "argument":  # its name stands there already
                one.display_type_rich = lambda ctx: None
            elif one.metavar is None:
                kind = getattr(one, "type", None) or one.type_descriptor.annotation  # in older and newer typer
                one.metavar = "" if one.is_flag else "N" if "int" in str(kind).lower() else "TEXT"
        return found


class Command(_Plain, typer.core.TyperCommand):
    """One command."""


class App(typer.Typer):
    """Commands of one group, whose help is alike."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[F], F]:
        return super().command(name, cls=Command, **options)


class Group(_Plain, typer.core.TyperGroup):
    """Commands whose errors about what was typed look like all others: words, and where help is, with status 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        standalone_mode = options.get("standalone_mode", True)
        try:
            status = super().main(*args, **{**options, "standalone_mode": False})
        except typer.Abort:
            status = 1
        except _TypedWrong as error:
            if not standalone_mode:
                raise
            command = error.ctx.command_path if error.ctx else "shardgrad"
            told = error.format_message().removeprefix("Invalid value: ")
            typer.echo(f"{told}\n{command} --help says what can be given", err=True)
            status = error.exit_code
        if standalone_mode:
            sys.exit(status)
        return status


_TypedWrong: Any = typer.BadParameter.__base__  # click's UsageError, which some versions of typer carry themselves


def help_if_alone(context: typer.Context) -> None:
    """For a group's callback: without a command, what the commands are."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def refuse(message: str, option: str | None = None) -> typer.BadParameter:
    """An error about what was typed, in `option` where it is said; the status is 2."""
    return typer.BadParameter(message, param_hint=option)


def check_file(path: Path | None, what: str = "a picture", endings: Sequence[str] = PICTURES) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        typer.BadParameter: there is no such folder, the path is a folder, or its ending is none of `endings`.
    """
    if path is None:
        return
    if endings and path.suffix not in endings:
        raise refuse(f"{what} ends in {', '.join(endings[:-1])} or {endings[-1]}, not {path.name!r}")
    if path.is_dir():
        raise refuse(f"{path} is a folder")
    if not path.absolute().parent.is_dir():
        raise refuse(f"there is no folder {path.absolute().parent}")


def read_dtype(name: str) -> str:
    """`bfloat16`, or `bf16`, as torch names it.

    Raises:
        typer.BadParameter: it is no dtype that products are computed in.
    """
    full = _SHORT.get(name.strip(), name.strip())
    if full not in DTYPES:
        short = ", ".join(_SHORT)
        raise refuse(f"{name!r} is no dtype: {', '.join(DTYPES)}, or in short {short}")
    return full


def list_shipped(names: Sequence[str], purpose: str) -> None:
    """What a command without a configuration shows: the shipped ones that it takes, and what each is for."""
    from shardgrad import shipped

    table(("name", purpose), [(name, shipped.purpose(name)) for name in names])


def read_pairs(text: str, example: str) -> dict[str, int]:
    """`n=4,d=8` as a dictionary.

    Raises:
        typer.BadParameter: it does not read so, or a name stands twice.
    """
    found: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = (side.strip() for side in part.partition("="))
        if not equals or not name or not number.isdecimal():
            raise refuse(f"cannot read {part!r}: write name=number, as in {example}")
        if name in found:
            raise refuse(f"{name} stands twice in {text!r}")
        found[name] = int(number)
    return found


def examples(*commands: str) -> str:
    """Command lines at the end of a command's `--help`."""
    return "\n\n".join(["Examples:", *(f"`{command}`" for command in commands)])
