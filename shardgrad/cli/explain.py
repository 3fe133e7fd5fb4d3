"""`shardgrad explain`: what each phase of a layout computes and communicates, in words, in bytes, as a picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Annotated, Any

import typer

from shardgrad.cli import options, style
from shardgrad.errors import LayoutError
from shardgrad.layout import idle
from shardgrad.layout.cost import itemsize
from shardgrad.layout.layout import Layout
from shardgrad.layout.presets import PRESETS
from shardgrad.layout.sizes import Balanced, rule
from shardgrad.layout.steps import Step, Timeline, check_rank, timeline
from shardgrad.layout.units import format_si

EPILOG = style.examples(
    "shardgrad explain column",
    "shardgrad explain row_sequence --code",
    "shardgrad explain row_sequence --sizes n=4096,d=16384,m=4096 --mesh tp=8 --dtype bfloat16",
    "shardgrad explain 'X[n,d] W[d,m/tp] -> Y[n,m/tp] + B[m/tp]' --sizes n=6,d=4,m=5 --mesh tp=2 --draw column.svg",
)
_SIZES, _MESH = "n=4096,d=1024,m=4096", "tp=4"


def _presets(incomplete: str) -> list[str]:
    return [name for name in PRESETS if name.startswith(incomplete)]


def explain(
    layout: Annotated[
        str | None,
        typer.Argument(
            help=f"a layout, such as 'X[n,d] W[d,m/tp] -> Y[n,m/tp]', or one by name: {', '.join(PRESETS)}; "
            "none: list those",
            autocompletion=_presets,
            show_default=False,
        ),
    ] = None,
    sizes: Annotated[
        str, typer.Option(metavar="LETTER=SIZE,…", help=f"global size of every letter, as {_SIZES}", show_default=False)
    ] = "",
    mesh: Annotated[
        str, typer.Option(metavar="AXIS=RANKS,…", help=f"ranks along every axis, as {_MESH}", show_default=False)
    ] = "",
    balanced: Annotated[
        bool, typer.Option("--balanced", help="all axes shard 9 over 4 as 3, 2, 2, 2, not as torch.chunk: 3, 3, 3, 0")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help=f"of the tensors: {', '.join(style.DTYPES)}, or in short bf16, …")
    ] = "float32",
    rank: Annotated[
        int, typer.Option(help="whose bytes and shapes; they differ between ranks if sizes are uneven")
    ] = 0,
    bias: Annotated[bool, typer.Option("--bias", help="add the default bias, where the layout writes none")] = False,
    save_gathered: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPERAND",
            show_default=False,
            help="an operand kept as gathered in forward, not gathered again; may be given twice",
        ),
    ] = None,
    draw: options.Draw = None,
    code: Annotated[
        bool, typer.Option("--code", help="print the Python that runs, forward and backward, and nothing else")
    ] = False,
    json: options.Json = False,
) -> None:
    """Tell what each phase of a layout computes and communicates; with sizes and a mesh, in bytes; and draw it."""
    if layout is None:
        _list(json)
        return
    dtype = style.read_dtype(dtype)
    style.check_file(draw)
    with style.exit_on(LayoutError, OSError):
        given = _read(layout)
        if bias and not given.has_bias:
            given = Layout(f"{given} + {given.bias}")
        unknown = [name for name in save_gathered or () if name not in (given.lhs.name, given.rhs.name)]
        if unknown:
            raise style.refuse(
                f"{unknown[0]!r} is no operand of {given}: {given.lhs.name} or {given.rhs.name}", "--save-gathered"
            )
        if balanced and not mesh:
            raise LayoutError(
                _wanted(given, "--balanced says how the axes of a mesh shard, and also needs sizes and one")
            )
        whole = style.read_pairs(sizes, _SIZES)
        shape = {axis: (Balanced if balanced else int)(ranks) for axis, ranks in style.read_pairs(mesh, _MESH).items()}
        if code:
            if draw or json:
                raise LayoutError(f"--code prints a program: leave out {'--draw' if draw else '--json'}")
            typer.echo(_program(given, shape, rank, dtype, save_gathered or ()), nl=False)
            return
        if not whole and not shape:
            if draw or json:
                raise LayoutError(_wanted(given, f"{'--draw' if draw else '--json'} also needs sizes and a mesh"))
            typer.echo(given.explain())
            return
        if not whole or (not shape and given.axes):
            raise LayoutError(_wanted(given, "bytes need the size of every letter, and a mesh"))
        walked = timeline(
            given,
            whole,
            shape,
            dtype,
            save_gathered=save_gathered or (),
        )
        check_rank(walked, rank)
        if draw is not None:
            from shardgrad.draw.layout_picture import draw as draw_layout  # matplotlib takes its time

            draw_layout(walked, draw)
        if json:
            style.print_json(_as_json(walked, rank))
        else:
            _print(walked, rank)
            if draw is not None:
                style.say(f"drawn in {draw}")


def _program(layout: Layout, shape: Mapping[str, int], rank: int, dtype: str, save_gathered: Collection[str]) -> str:
    """The program of a rank; without a mesh, of the first rank where every axis has several."""
    if not shape and not rank:
        return layout.program(save_gathered=save_gathered, dtype=dtype)
    if not 0 <= rank < prod(shape.values()):
        raise LayoutError(f"rank {rank} is not one of the {prod(shape.values())} ranks of the mesh {dict(shape)}")
    coordinate, rest = {}, rank
    for axis, size in reversed(list(shape.items())):  # the last axis runs fastest
        rest, coordinate[axis] = divmod(rest, size)
    return layout.program(shape, save_gathered=save_gathered, dtype=dtype, coordinate=coordinate)


def _read(layout: str) -> Layout:
    return Layout(layout) if "[" in layout else PRESETS[layout]


def _wanted(layout: Layout, why: str) -> str:
    """What to add to the command line."""
    sizes = ",".join(f"{letter}=…" for letter in layout.letters)
    mesh = ",".join(f"{axis}=…" for axis in layout.axes)
    return f"{why}: --sizes {sizes}{f' --mesh {mesh}' if mesh else ''}"


def _list(json: bool) -> None:
    if json:
        style.print_json({name: str(layout) for name, layout in PRESETS.items()})
    else:
        style.table(("name", "layout"), [(name, str(layout)) for name, layout in PRESETS.items()])


def _print(walked: Timeline, rank: int) -> None:
    on = style.console()
    style.say(str(walked.layout), on=on)
    style.say(
        f"{_numbers(walked.sizes)};  mesh {_numbers(walked.mesh) or 'of one rank'}{_rule(walked)};  {walked.dtype}\n",
        on=on,
    )
    style.table(
        ("tensor", "global", f"on rank {rank}", "bytes", "copies"),
        [
            (
                t["stored"],
                "×".join(map(str, t["shape"])) or "1",
                "×".join(map(str, t["local"])) or "1",
                format_si(t["bytes"], "B"),
                str(t["copies"]),
            )
            for t in _tensors(walked, rank)
        ],
        numbers=("global", f"on rank {rank}", "bytes", "copies"),
        on=on,
    )
    on.print()
    one, every = f"rank {rank}", "all ranks"
    rows = []
    for step in walked.steps:
        for at, (what, mine, all_of_them) in enumerate(_lines(step, rank)):
            rows.append((step.name if at == 0 else "", what, mine, all_of_them))
    sent = [_sent(step) for step in walked.steps]
    totals = [format_si(sum(by_rank[rank] for by_rank in sent), "B"), format_si(sum(map(sum, sent)), "B")]
    style.table(
        ("phase", "computes and communicates", one, every),
        rows,
        numbers=(one, every),
        total=("", "sent in forward and backward", *totals),
        on=on,
    )
    for note in idle.notes(walked.layout, walked.sizes, walked.mesh):
        style.say(note, on=on)


def _numbers(found: Any) -> str:
    return ", ".join(f"{name} = {number}" for name, number in found.items())


def _rule(walked: Timeline) -> str:
    return " (balanced)" if rule(*walked.mesh.values()) == "balanced" else ""


def _lines(step: Step, rank: int) -> list[tuple[str, str, str]]:
    """What is computed and moved, in order, with amounts of one rank and of all."""

    def moved(moves: Any) -> list[tuple[str, str, str]]:
        lines = []
        for one in moves:
            verb = "keep own part of" if one.move.kind == "slice" else one.move.kind
            sent = (
                ("–", "–")
                if one.move.kind == "slice"
                else (format_si(one.bytes[rank], "B"), format_si(sum(one.bytes), "B"))
            )
            lines.append((f"{verb} {one.tensor} over {one.move.axis}", *sent))
        return lines

    lines = moved(m for read in step.reads for m in read.moves)
    amounts = (
        ("–", "–") if not any(step.flops) else (format_si(step.flops[rank], "FLOP"), format_si(sum(step.flops), "FLOP"))
    )
    lines.append((step.formula, *amounts))
    lines += moved(step.made.moves)
    lines += [(f"leave {step.made.name} partial over {axis}", "–", "–") for axis in step.made.partial_after]
    if step.bias is not None:
        lines += moved(step.bias.moves)
        lines.append((f"add {step.bias.name}, once", "–", "–"))
    return lines


def _sent(step: Step) -> list[int]:
    """Bytes that each rank sends in a phase."""
    return [sum(moved.bytes[rank] for moved in step.moves) for rank in range(len(step.flops))]


def _tensors(walked: Timeline, rank: int) -> list[dict[str, Any]]:
    layout, here = walked.layout, walked.ranks[rank]
    rows = []
    for spec in layout.tensors if layout.has_bias else layout.tensors[:3]:
        local = here.shape_of(spec.dims)
        copies = prod(size for axis, size in walked.mesh.items() if axis not in spec.axes)
        shape = [walked.sizes[letter] for letter in spec.letters]
        size = prod(local) * itemsize(walked.dtype)
        rows.append(
            {
                "tensor": spec.name,
                "stored": str(spec),
                "shape": shape,
                "local": list(local),
                "bytes": size,
                "copies": copies,
            }
        )
    return rows


def _as_json(walked: Timeline, rank: int) -> dict[str, Any]:
    phases = []
    for step in walked.steps:
        moves = [
            {
                "operation": moved.move.kind,
                "tensor": moved.tensor,
                "axis": moved.move.axis,
                "bytes": moved.bytes[rank],
                "bytes_all_ranks": sum(moved.bytes),
            }
            for moved in step.moves
        ]
        phases.append(
            {
                "phase": step.name,
                "computes": step.formula,
                "flop": step.flops[rank],
                "flop_all_ranks": sum(step.flops),
                "moves": moves,
            }
        )
    return {
        "layout": str(walked.layout),
        "sizes": dict(walked.sizes),
        "mesh": dict(walked.mesh),
        "dtype": walked.dtype,
        "rank": rank,
        "tensors": _tensors(walked, rank),
        "phases": phases,
        "idle": idle.notes(walked.layout, walked.sizes, walked.mesh),
        "bytes": sum(_sent(step)[rank] for step in walked.steps),
        "bytes_all_ranks": sum(sum(_sent(step)) for step in walked.steps),
    }
