"""From local shapes to sizes: check them, and learn what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

from torch import SymInt, Tensor

from shardgrad.comm.mesh import MeshView
from shardgrad.errors import ShapeError
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.plan import Move
from shardgrad.layout.sizes import Level, Sizes


def learn(
    specs: Sequence[TensorSpec],
    tensors: Sequence[Tensor],
    given: Mapping[str, int] | None,
    view: MeshView,
    user: object,
) -> Sizes:
    """The sizes that follow from the local shapes and the `given` global sizes. Those that torch.compile leaves open
    are compared when its graph runs.

    Raises:
        ShapeError: they contradict the layout, each other, or how the axes shard.
    """
    sizes = Sizes(view.shape, view.coordinate)
    source: dict[Level, str] = {}
    for letter, size in (given or {}).items():
        if not any(letter in spec.letters for spec in specs):
            raise ShapeError(f"sizes names {letter!r}, which is no letter of {user}")
        if not isinstance(size, Integral | SymInt) or size < 0:
            raise ShapeError(f"{letter} = {size!r} is given, which is not a number of elements (in {user})")
        sizes.known[letter, ()] = size
        source[letter, ()] = f"{letter} = {size} is given"
    found = []
    for spec, tensor in zip(specs, tensors):
        if tensor.dim() != len(spec.dims):
            raise ShapeError(
                f"{spec} has {len(spec.dims)} dims, but the tensor given for {spec.name} has {tensor.dim()}: "
                f"shape {tuple(tensor.shape)} (in {user})"
            )
        for dim, size in zip(spec.dims, tensor.shape):
            found.append((sizes.level(dim.letter, dim.axes), size, spec, tuple(tensor.shape)))
    for level, size, spec, shape in sorted(found, key=lambda entry: len(entry[0][1])):
        letter, axes = level
        expected = sizes.get(letter, axes)
        if expected is None:
            sizes.known[level] = size
            source[level] = f"{spec} has local shape {shape}, so {'/'.join((letter, *axes))} = {size}"
        elif not isinstance(size, SymInt) and not isinstance(expected, SymInt) and expected != size:
            from shardgrad.ops.size_exchange import contradiction

            raise ShapeError(contradiction(level, size, expected, spec, shape, sizes, source, view, user))
    return sizes


def unknown(moves: Sequence[Move], sizes: Sizes) -> list[Level]:
    """The levels that the moves gather to and that nothing known gives, coarsest first, none twice."""
    missing: list[Level] = []
    for move in moves:
        if move.kind != "all-gather" or sizes.shape[move.axis] == 1:
            continue
        whole = move.after[move.dim]
        level = sizes.level(whole.letter, whole.axes)
        if sizes.get(*level) is None and level not in missing:
            missing.append(level)
    missing.sort(key=lambda level: len(level[1]))
    coarsest: list[Level] = []
    for letter, axes in missing:
        if not any(other == letter and axes[: len(above)] == above for other, above in coarsest):
            coarsest.append((letter, axes))
    return coarsest
