"""`shardgrad mutants`: bugs planted into working programs; which of them verification finds and names."""

from __future__ import annotations

from typing import Annotated, Any, NoReturn

import typer

from shardgrad.cli import options, style
from shardgrad.cli import ranks as started

EPILOG = style.examples('shardgrad mutants "by hand" --ranks 3', "shardgrad mutants --right attention")


def mutants(
    only: Annotated[str, typer.Argument(help="those alone whose name or program contains this")] = "",
    right: Annotated[
        bool, typer.Option("--right", help="right programs instead, none of which may be accused")
    ] = False,
    ranks: Annotated[int, typer.Option(min=1, max=4, help="processes; bugs need two")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="training steps for the usual checks")] = 30,
    markdown: Annotated[bool, typer.Option("--markdown", help="print a table for docs/mutants.md")] = False,
    json: options.Json = False,
) -> None:
    """Plant known bugs into working programs, one at a time, and see whether `sg.verify` finds and names them.

    Beside it stands which of the usual checks each passes. The last rows are the programs without a bug, which must not
    be accused. Ends with status 0 if every bug is caught and named as it should be, and no program accused.

    `--right` verifies right programs instead, as users write them, each in several precisions: each passes, or it
    cannot be told, with why. Ends with status 0 if none is accused.
    """
    if ranks < 2 and not right:
        raise style.refuse("a bug needs two ranks")
    _check(only, right)
    started.start(ranks)
    if right:
        _right(only, markdown, json)

    import torch.distributed as dist

    from shardgrad.mutants import run

    dist.init_process_group("gloo")
    programs = run.programs(dist.get_world_size())
    chosen = [one for one in run.mutants() if only in one.name or only in one.program]
    found = [run.try_one(one, programs[one.program], steps) for one in chosen]
    found += [run.control(name, programs[name], steps) for name in dict.fromkeys(one.program for one in chosen)]
    if dist.get_rank() == 0:
        if json:
            from dataclasses import asdict

            style.print_json([asdict(one) for one in found])
        elif markdown:
            typer.echo(_markdown(found))
        else:
            _table(found)
    dist.destroy_process_group()
    bad = [one for one in found if not one.named or one.caught != (one.name != "(none)")]
    started.end(1 if bad else 0)


def _check(only: str, right: bool) -> None:
    """Find that nothing is called so before any rank is started."""
    if right:
        from shardgrad.mutants.right import table

        known = {kind.name for kind in table.KINDS}
        names = known
    else:
        from shardgrad.mutants import run

        known = {one.program for one in run.mutants()}
        names = known | {one.name for one in run.mutants()}
    if not any(only in name for name in names):
        raise style.refuse(
            f"no name of a bug or program contains {only!r}; the programs are {', '.join(sorted(known))}"
        )


def _right(only: str, markdown: bool, json: bool) -> NoReturn:
    """Verify the right programs, tell what is said of each, and end."""
    with started.joined() as first:
        import torch.distributed as dist

        from shardgrad.mutants.right import table

        mesh = table.mesh_of(dist.get_world_size())
        found = [table.try_one(kind, dtype, mesh) for kind, dtype in table.chosen(only)]
        if first and json:
            from dataclasses import asdict

            style.print_json([asdict(one) for one in found])
        elif first:
            columns, rows = table.rows(found)
            summary = table.summary(found)
            if markdown:
                lines = [" | ".join(row) for row in (columns, ["---"] * len(columns), *rows)]
                typer.echo("\n".join([summary, "", *(f"| {line} |" for line in lines)]))
            else:
                style.table(columns, rows)
                style.say(summary)
    started.end(1 if any(one.said == table.ACCUSED for one in found) else 0)


def _row(one: Any) -> list[str]:
    verdict = "passes" if not one.caught else "caught"
    explained = ", ".join(one.found) if one.found else ("" if not one.caught else "no explanation fits")
    checks = [one.usual["falls"], one.usual["loss_agrees"], one.usual["norm_agrees"]]
    return [one.name, one.program, f"{verdict}: {one.first}" if one.first else verdict, explained,
            *("passes" if check else "fails" for check in checks)]  # fmt: skip


_COLUMNS = ("planted", "program", "verify", "explanations that fit", "loss falls", "loss within 1 %", "norm within 5 %")


def _table(found: list[Any]) -> None:
    rows = []
    for one in found:
        name, program, verdict, explained, *checks = _row(one)
        failed = [column for column, check in zip(("falls", "loss", "norm"), checks) if check == "fails"]
        rows.append([f"{name} ({program})", verdict, explained, ", ".join(failed) + " fail" if failed else "all pass"])
    style.table(("planted", "verify", "explanations that fit", "usual checks"), rows)
    style.say(_summary(found))


def _summary(found: list[Any]) -> str:
    planted = [one for one in found if one.name != "(none)"]
    right = [one for one in found if one.name == "(none)"]
    unknown = sum(not one.expected and one.named for one in planted)
    named = sum(one.named for one in planted) - unknown
    usual = sum(one.usual["passes"] for one in planted)
    return (
        f"{len(planted)} bugs: {sum(one.caught for one in planted)} caught, {named} of them explained, "
        f"{unknown} found to fit no explanation, as foreseen. {usual} pass all three usual checks. Of {len(right)} "
        f"programs without a bug, {sum(one.caught for one in right)} are accused."
    )


def _markdown(found: list[Any]) -> str:
    columns = (*_COLUMNS[:1], "from", *_COLUMNS[1:])
    lines = [_summary(found), "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for one in found:
        first, *rest = _row(one)
        lines.append("| " + " | ".join([first, one.origin, *rest]) + " |")
    return "\n".join(lines)
