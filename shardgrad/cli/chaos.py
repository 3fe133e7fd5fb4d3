"""`shardgrad chaos`: what breaks in practice, done on purpose; what held, and what did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from shardgrad.cli import options, style

if TYPE_CHECKING:
    from shardgrad.chaos.tally import Row

EPILOG = style.examples("shardgrad chaos", "shardgrad chaos layouts calls --seed 3 --count 200")
_FEW = {"layouts": 2000, "calls": 1000, "configurations": 200, "checkpoints": 20, "deaths": 4}
"""Attacks of each kind without `--count`: some three minutes in all on two cores."""


def chaos(
    kinds: Annotated[
        list[str] | None, typer.Argument(help=f"what is attacked: {', '.join(_FEW)}; all of it by default")
    ] = None,
    seed: Annotated[int, typer.Option(help="another seed makes other attacks")] = 0,
    count: Annotated[
        int | None, typer.Option(min=1, help="attacks of each kind; by default as many as take a minute")
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, max=8, help="most ranks of a job, one of which dies")] = 3,
    json: options.Json = False,
) -> None:
    """Attack shardgrad: random wrong layouts, calls and configurations, damaged checkpoints, killed and stopped ranks.

    Right is a result, or an error that names what is wrong; of a rank that died or was stopped, that all others end
    within 30 s and name it. Ends with status 1 if anything did not hold; what failed is printed.
    """
    wrong = [kind for kind in kinds or () if kind not in _FEW]
    if wrong:
        raise style.refuse(f"{wrong[0]!r} is not one of {', '.join(_FEW)}")
    found: list[tuple[str, Row]] = []
    for kind in kinds or _FEW:
        for row in _attack(kind, seed, _FEW[kind] if count is None else count, ranks):
            found.append((kind, row))
            if not json:
                style.say(f"{kind}, {row.attack}: {row.held} of {row.tried} held")
                for failure in row.failures[:20]:
                    style.say(f"  {failure}")
    if json:
        from dataclasses import asdict

        style.print_json([{"kind": kind, **asdict(row)} for kind, row in found])
    if any(row.failures for _, row in found):
        raise typer.Exit(1)


def _attack(kind: str, seed: int, count: int, ranks: int) -> list[Row]:
    from tempfile import TemporaryDirectory

    from shardgrad.chaos import calls, checkpoints, configurations, deaths, layouts

    if kind == "checkpoints":
        with calls.alone() as mesh, TemporaryDirectory() as folder:
            from pathlib import Path

            return checkpoints.run(mesh, Path(folder), seed, count)
    if kind == "deaths":
        return deaths.run(seed, count, ranks)
    run: dict[str, Callable[[int, int], list[Row]]] = {
        "layouts": layouts.run,
        "calls": calls.run,
        "configurations": configurations.run,
    }
    return run[kind](seed, count)
