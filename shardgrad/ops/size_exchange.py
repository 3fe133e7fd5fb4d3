"""Sizes that local shapes do not give, exchanged between ranks; and what is said where shapes contradict each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardgrad.comm.collectives import gather_ints, whole_size
from shardgrad.comm.mesh import MeshView
from shardgrad.errors import ShapeError
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.sizes import Level, Sizes, chunks, rule, slab


def exchange(missing: Sequence[Level], sizes: Sizes, view: MeshView, user: object) -> None:
    """Learn the missing levels from the other ranks' shards: one small exchange for each axis they are stored on.

    Raises:
        ShapeError: on every rank that sees it, if the shards are not as the axes shard; in the capture of a CUDA
            graph, in which the host cannot read them.
    """
    if view.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        letters = sorted({letter for letter, _ in missing})
        raise ShapeError(
            f"the ranks would have to exchange the size of {', '.join(letters)}, which cannot be in the capture of "
            f"a CUDA graph: pass sizes={{{letters[0]!r}: …}} (layers: sequence_size=…; in {user})"
        )
    by_axes: dict[tuple[str, ...], list[tuple[Level, int]]] = {}
    for letter, axes in missing:
        finer = [known for known in sizes.known if known[0] == letter and known[1][: len(axes)] == axes]
        assert finer, f"nothing carries {letter} sharded over {axes}"
        best = min(finer, key=lambda level: len(level[1]))
        by_axes.setdefault(best[1][len(axes) :], []).append(((letter, axes), sizes.known[best]))
    for over, entries in by_axes.items():
        values = [size for _, size in entries]
        for name in reversed(over):
            axis = view.axes[name]
            rows = gather_ints(values, axis, view.device, f"exchange of sizes for {user}")
            for at, (((letter, _), _), column) in enumerate(zip(entries, zip(*rows))):
                values[at] = whole_size(column, axis, f"{letter} (in {user})")
        for (level, _), total in zip(entries, values):
            sizes.known[level] = total

    for (letter, axes), size in sizes.known.items():
        for depth in range(len(axes) - 1, -1, -1):
            above = sizes.known.get((letter, axes[:depth]))
            if above is not None:
                expected = slab(above, axes[depth:], sizes.shape, sizes.coordinate)[1]
                if expected != size:
                    raise ShapeError(
                        f"{'/'.join((letter, *axes))} is {size} on this rank, but "
                        f"{'/'.join((letter, *axes[:depth]))} is {above} in all, so it "
                        f"should be {expected} ({rule(*(sizes.shape[axis] for axis in axes))}; in {user})"
                    )
                break


def contradiction(
    level: Level,
    size: int,
    expected: int,
    spec: TensorSpec,
    shape: tuple[int, ...],
    sizes: Sizes,
    source: dict[Level, str],
    view: MeshView,
    user: object,
) -> str:
    letter, axes = level
    depth = next(n for n in range(len(axes), -1, -1) if (letter, axes[:n]) in sizes.known)
    base = letter, axes[:depth]
    where = ", ".join(f"{axis} = {view.coordinate[axis]} of {view.shape[axis]}" for axis in axes) or "unsplit"
    lines = [
        f"{spec.name} has local shape {shape}, which does not fit {spec} in {user}:",
        f"  its {'/'.join((letter, *axes))} is {size} here ({where}); it should be {expected}",
        f"  because {source.get(base, f'{letter} = {sizes.known[base]} was exchanged')}",
    ]
    known = sizes.known[base]
    for axis in axes[depth:]:
        parts = chunks(known, view.shape[axis])
        lines.append(f"  {known} over {axis} is sharded as {parts} ({rule(view.shape[axis])})")
        known = parts[view.coordinate[axis]]
    if axes:
        lines.append("  shard tensors with sg.shard(full, layout[name], mesh)")
    if ";" in str(user):
        lines.append("  (a letter has one size in all layouts of a call: give another size another letter)")
    return "\n".join(lines)
