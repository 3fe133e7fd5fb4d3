"""From a cell as it was written to one that can run: mesh, sizes, layout and backend written out, or refused."""

from __future__ import annotations

from math import prod

from shardgrad.errors import LayoutError, shorten
from shardgrad.layout.layout import Layout
from shardgrad.layout.presets import PRESETS
from shardgrad.scale.cell import BLOCK, STEP, Cell
from shardgrad.settings import ConfigError

_MOST_RANKS = 2**16
_MOST_ELEMENTS = 2**60


def resolve(cell: Cell) -> Cell:
    """The cell with its mesh, its grown sizes, its layout and its backend written out.

    Raises:
        ConfigError: keys disagree, or the layout, the sizes or the training configuration cannot be used so.
    """
    layout = _layout(cell)
    if cell.kind == "step":
        from shardgrad.scale import training  # takes its time, and its libraries

        ranks = _ranks(cell)
        sizes = _grown(cell, ranks)
        config = training.read(cell, sizes, ranks)
        if (needed := training.least_bytes(config, ranks)) > _MOST_ELEMENTS:
            raise ConfigError(f"sizes of {cell.train}: {needed:.1e} bytes at the least are more than can be counted")
        mesh = training.shape(config)
    else:
        mesh = _mesh(cell, layout)
        ranks = prod(mesh.values())
        sizes = _grown(cell, ranks)
    backend = cell.backend or ("nccl" if cell.device == "cuda" else "gloo")
    update = {"mesh": mesh, "ranks": ranks, "sizes": sizes, "backend": backend}
    made = cell.model_copy(update=update | ({"layout": str(layout)} if layout is not None else {}))
    if layout is not None:
        try:
            first = dict.fromkeys(mesh, 0)
            made.product.collectives(sizes, mesh, cell.dtype, save_gathered=cell.keep, coordinate=first)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if made.elements() > _MOST_ELEMENTS:
        raise ConfigError(f"sizes = {shorten(sizes)}: {made.elements():.1e} elements are more than can be counted")
    return made


def _layout(cell: Cell) -> Layout | None:
    foreign = {"layer": ("train", "set"), "block": ("layout", "train", "set"), "step": ("layout",)}[cell.kind]
    for key in (*foreign, *(() if cell.kind == "layer" else ("bias", "keep"))):
        if getattr(cell, key):
            raise ConfigError(f"{key} is for another kind of cell than a {cell.kind}")
    if not cell.sequence_parallel and cell.kind == "layer":
        raise ConfigError("sequence_parallel is for a block or a step: write it into the layout")
    if cell.kind == "step" and cell.train is None:
        raise ConfigError("train is missing: a step needs a training configuration, such as configs/quickstart.yaml")
    if cell.kind == "block":
        _check_block(cell)
        return None
    if cell.kind == "step":
        for name in cell.sizes:
            if name not in STEP:
                raise ConfigError(f"sizes.{name} is no size of a step, which has {', '.join(STEP)}")
        return None
    if cell.layout is None:
        raise ConfigError("layout is missing: of a layer, such as column or 'X[n,d] W[d,m/tp] -> Y[n,m/tp]'")
    try:
        return Layout(cell.layout) if "[" in cell.layout else PRESETS[cell.layout]
    except LayoutError as error:
        raise ConfigError(str(error)) from None


def _check_block(cell: Cell) -> None:
    for name, meaning in BLOCK.items():
        if name not in cell.sizes:
            raise ConfigError(f"sizes.{name} is missing: {meaning}")
    for name in cell.sizes:
        if name not in BLOCK:
            raise ConfigError(f"sizes.{name} is no size of a block, which has {', '.join(BLOCK)}")
    if cell.sizes["d"] % cell.sizes["heads"]:
        raise ConfigError(f"sizes.d = {cell.sizes['d']} does not divide by sizes.heads = {cell.sizes['heads']}")


def _ranks(cell: Cell) -> int:
    if cell.mesh is None:
        if cell.ranks is None:
            raise ConfigError("ranks is missing: say ranks, or a mesh")
        return _counted(cell.ranks)
    ranks = prod(cell.mesh.values())
    if cell.ranks not in (None, ranks):
        raise ConfigError(f"mesh = {cell.mesh} has {ranks} ranks, not ranks = {cell.ranks}")
    return _counted(ranks)


def _counted(ranks: int) -> int:
    if ranks > _MOST_RANKS:
        raise ConfigError(f"{ranks:,} ranks are more than the {_MOST_RANKS:,} of a cell")
    return ranks


def _mesh(cell: Cell, layout: Layout | None) -> dict[str, int]:
    axes, ranks = layout.axes if layout is not None else ("tp",), _ranks(cell)
    if cell.mesh is None:
        if len(axes) != 1:
            example = ", ".join(f"{axis}: …" for axis in axes)
            raise ConfigError(f"{layout} has {len(axes)} axes: say mesh: {{{example}}} for {ranks} ranks")
        return {axes[0]: ranks}
    missing = [axis for axis in axes if axis not in cell.mesh]
    if missing:
        raise ConfigError(f"mesh = {cell.mesh} lacks the axis {missing[0]!r} of {layout or 'a block'}")
    return dict(cell.mesh)


def _grown(cell: Cell, ranks: int) -> dict[str, int]:
    sizes = dict(cell.sizes)
    for name, power in cell.grow.items():
        if name not in sizes:
            raise ConfigError(f"grow.{name}: there is no sizes.{name} to grow from")
        sizes[name] = max(1, round(sizes[name] * ranks**power))  # below 2**48 * 2**128
    # A width must divide by the heads; the nearest that does.
    width = {"block": "d", "step": "d_model"}.get(cell.kind)
    if cell.grow and width in sizes and "heads" in sizes:
        sizes[width] = max(1, round(sizes[width] / sizes["heads"])) * sizes["heads"]
    return sizes
