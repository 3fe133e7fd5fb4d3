"""`shardgrad scale`: run a scaling experiment, go on with it, rehearse it without its machines, compare two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardgrad.cli import options, style

if TYPE_CHECKING:
    from rich.console import Console

    from shardgrad.scale.config import Experiment, Planned
    from shardgrad.scale.results import Line

EPILOG = style.examples(
    "shardgrad scale configs/scaling/strong.yaml",
    "shardgrad scale configs/scaling/strong.yaml run.repeats=3 'matrix.ranks=[1, 2]' run.dir=runs/quick",
    "shardgrad scale configs/scaling/ranks-1024.yaml --dry-run --rank 1023",
    "shardgrad scale --compare runs/scaling/strong runs/scaling/strong-new",
)
_INTERRUPTED = 130


def scale(
    config: Annotated[
        str | None,
        typer.Argument(help="an experiment's file, or the name of a shipped one; none: list those", show_default=False),
    ] = None,
    overrides: options.Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="start nothing: say what one rank of each cell would hold and send")
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="with --dry-run: which rank; cells with fewer show their last")] = 0,
    retry: Annotated[
        bool, typer.Option("--retry", help="when going on, run once more what failed or was skipped")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="compare two results: folders or .jsonl files", show_default=False),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            metavar="PREFIX",
            help="also draw PREFIX-speed-up.svg, PREFIX-time.svg, PREFIX-bytes.svg",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Run a matrix of cells, each on ranks of its own under torchrun, and show times, efficiency, bytes and memory.

    Results land in run.dir: results.jsonl (a line a cell), table.txt and pictures. Stopped, by a signal or a crash, the
    same command goes on where it stopped. A cell that fails is written down with its reason, and the others are run.

    Ends with status 0 if every cell has figures or was skipped, 1 if one failed or all were skipped, 2 if the
    configuration cannot be used.
    """
    from shardgrad.settings import ConfigError

    if compare is not None:
        if config is not None:
            raise style.refuse("--compare takes two results and no configuration")
        with style.exit_on(ConfigError):
            _compare(*compare, json)
        return
    if config is None:
        from shardgrad import shipped

        style.list_shipped(shipped.names("scaling"), "what it measures")
        return
    with style.exit_on(ConfigError):
        from shardgrad.scale.config import load

        experiment = load(config, overrides or [])
    if dry_run:
        with style.exit_on(ConfigError):
            _rehearse(experiment, rank, json)
        return
    if draw is not None and not draw.absolute().parent.is_dir():
        raise style.refuse(f"there is no folder {draw.absolute().parent}")
    with style.exit_on(ConfigError):
        failed = _run(experiment, retry, draw, json)
    raise typer.Exit(1 if failed else 0)


def _run(experiment: Experiment, retry: bool, draw: Path | None, json: bool) -> bool:
    from shardgrad.scale import driver, pictures, results, table

    with results.opened(experiment.dir) as opened:
        try:
            with _progress(len(experiment.planned)) as show:
                lines = driver.run(experiment, opened, show, retry=retry)
        except driver.Stopped as stopped:
            done = sum(any(line["key"] == planned.cell.key for line in opened.lines) for planned in experiment.planned)
            typer.echo(
                f"stopped by {stopped} after {done} of {len(experiment.planned)} cells; "
                "the same command goes on from there",
                err=True,
            )
            raise typer.Exit(_INTERRUPTED) from None
    rows = table.rows(experiment.planned, lines)
    left = pictures.draw(experiment.config.title, rows, experiment.dir, experiment.config.run.pictures)
    if draw is not None:
        left += pictures.draw(experiment.config.title, rows, draw.parent, experiment.config.run.pictures, draw.name)
    with (experiment.dir / "table.txt").open("w", encoding="utf-8") as file:
        from rich.console import Console

        _print(experiment, lines, rows, Console(file=file, width=style.WIDTH, highlight=False, color_system=None))
    if json:
        style.print_json(lines)
    else:
        _print(experiment, lines, rows, style.console())
        style.say(
            f"left in {experiment.dir}: results.jsonl, table.txt; pictures: {', '.join(map(str, left)) or 'none'}"
        )
    return any(line["status"] == "failed" for line in lines) or all(line["status"] == "skipped" for line in lines)


def _print(experiment: Experiment, lines: list[Line], rows: list[Any], on: Console) -> None:
    from shardgrad.scale import machine, table

    left_out = _columns(experiment.config.title, table.columns(rows), table.DISPENSABLE, on)
    run = experiment.config.run
    said = sorted({machine.describe_machine(line["machine"]) for line in lines})
    style.say(
        f"median of {run.repeats} step{'s' if run.repeats > 1 else ''} (each as long as on its slowest rank) after "
        f"{run.warmup} of warm-up, on {'; '.join(said)}. "
        "comm.: share of the time that ranks spend starting collectives and blocked on them; sent: bytes that the rank "
        "which sends most sends in a step, as predicted where no ! stands; memory: the most a rank needed beyond the "
        "interpreter and its libraries."
        + (f" Left out for want of room: {', '.join(left_out)} (results.jsonl has all)." if left_out else ""),
        on=on,
    )
    for note in table.notes(rows):
        style.say(f"- {note}", on=on)


def _columns(title: str, columns: dict[str, list[str]], dispensable: Sequence[str], on: Console) -> list[str]:
    """Print those columns for which there is room; returns the names of the others."""
    kept, left_out = style.fit(columns, dispensable, on.width)
    style.table(list(kept), zip(*kept.values()), title=title, numbers=list(kept)[1:], on=on)
    return left_out


@contextmanager
def _progress(cells: int) -> Iterator[Any]:
    """A bar on a terminal, a line a cell elsewhere; on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as progress:
        yield _Show(progress, progress.add_task("", total=cells), cells)


class _Show:
    def __init__(self, progress: Any, task: Any, cells: int) -> None:
        self._progress, self._task, self._cells = progress, task, cells
        self._terminal = progress.console.is_terminal

    def begin(self, planned: Planned, at: int) -> None:
        self._progress.update(self._task, description=planned.name)

    def end(self, planned: Planned, line: Line, at: int, *, again: bool) -> None:
        from shardgrad.scale.table import seconds

        self._progress.update(self._task, completed=at + 1)
        outcome = seconds(line["seconds"]) if line["status"] == "ok" else f"{line['status']}: {line['reason']}"
        text = f"{at + 1}/{self._cells}  {planned.name}: {outcome}{'  (there already)' if again else ''}"
        if self._terminal:
            self._progress.console.print(text, markup=False, soft_wrap=True)
        else:
            typer.echo(text, err=True)


def _rehearse(experiment: Experiment, rank: int, json: bool) -> None:
    from dataclasses import asdict

    from shardgrad.layout.units import format_si
    from shardgrad.scale import dry, idle

    found = [
        (planned, dry.rehearse(planned.cell, min(rank, planned.cell.world - 1), experiment.config.run.seed))
        for planned in experiment.planned
    ]
    if json:
        style.print_json(
            [
                {"name": p.name, "cell": p.cell.model_dump(), **asdict(one), "idle": idle.notes(p.cell)}
                for p, one in found
            ]
        )
        return
    on = style.console()
    title = f"{experiment.config.title}: rehearsed, nothing was run"
    left_out = _columns(title, dry.columns(found), dry.DISPENSABLE, on)
    for planned, one in found:
        style.say(f"{planned.name}: rank {one.rank:,} of {planned.cell.world:,}", on=on)
        for note in idle.notes(planned.cell):
            style.say(f"  {note}", on=on)
        shapes: dict[str, int] = {}
        for name, shape in one.shapes.items():
            text = "×".join(map(str, shape)) or "1"
            text = f"{name} {text}" if len(one.shapes) <= 8 else text
            shapes[text] = shapes.get(text, 0) + 1
        listed = ", ".join(text if count == 1 else f"{count} of {text}" for text, count in shapes.items())
        style.say(f"  tensors: {listed}", on=on)
        for name, count in one.traced.items():
            style.say(f"  {one.counts[name]} {name}: {format_si(count, 'B')}", on=on)
    style.say(
        "stored: parameters and inputs; saved: what forward keeps for backward; sent: as predicted where no ! stands. "
        "One rank was built as torch's fake backend has it, in shapes alone: bytes are those of tensors, without what "
        "an allocator adds or a product needs for a while."
        + (f" Left out for want of room: {', '.join(left_out)}." if left_out else ""),
        on=on,
    )


def _compare(a: Path, b: Path, json: bool) -> None:
    from shardgrad.scale import compare, machine, results
    from shardgrad.settings import ConfigError

    first, second = results.read(a), results.read(b)
    both, only_a, only_b = compare.pairs(first, second)
    if not both:
        raise ConfigError(f"{a} and {b} have no finished cell in common")
    abouts = compare.about(first), compare.about(second)
    if json:
        style.print_json(
            {
                "a": abouts[0],
                "b": abouts[1],
                "cells": [
                    {"name": pair.name, "key": pair.a["key"], "a": pair.a["seconds"], "b": pair.b["seconds"],
                     "ratio": pair.ratio, "verdict": pair.verdict, "bytes_a": pair.a["bytes_traced"],
                     "bytes_b": pair.b["bytes_traced"]}
                    for pair in both
                ],
                "only_a": [line["name"] for line in only_a],
                "only_b": [line["name"] for line in only_b],
            }
        )  # fmt: skip
        return
    on = style.console()
    for name, path, about in (("A", a, abouts[0]), ("B", b, abouts[1])):
        host = about["machine"]
        facts = machine.describe_machine(host) if isinstance(host, dict) else f"{len(host)} machines"
        commit = about["commit"]
        at = f"{len(commit)} commits" if isinstance(commit, list) else f"commit {str(commit)[:10]}"
        torch = about["versions"]["torch"] if isinstance(about["versions"], dict) else "several versions"
        style.say(f"{name}: {path} ({at}, torch {torch}, {facts})", on=on)
    columns = compare.columns(both)
    style.table(
        list(columns),
        zip(*columns.values()),
        numbers=[name for name in columns if name not in ("cell", "")],
        dispensable=compare.DISPENSABLE,
        on=on,
    )
    style.say("within the spread: the quartiles of A and B overlap.", on=on)
    for name, lines in (("A", only_a), ("B", only_b)):
        if lines:
            style.say(f"only in {name}: {'; '.join(line['name'] for line in lines)}", on=on)
