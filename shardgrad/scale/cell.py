"""One cell of an experiment: what is run, on which ranks."""

from __future__ import annotations

import hashlib
import json
from math import prod
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from shardgrad.errors import LayoutError
from shardgrad.layout import PRESETS, Layout
from shardgrad.settings import ConfigError, Number, Section

STEP = {
    "layers": "model.layers",
    "heads": "model.heads",
    "d_model": "model.d_model",
    "sequence": "model.seq_len",
    "batch": "train.batch",
}
BLOCK = {
    "batch": "sequences",
    "sequence": "positions of a sequence",
    "d": "width of the residual stream",
    "heads": "attention heads, which divide d",
}


def _off(value: object) -> object:
    """YAML 1.1 reads off as false."""
    return None if value is False else value


_Count = Annotated[int, Field(ge=1)]


class Cell(Section):
    kind: Literal["layer", "block", "step"] = Field(
        default="layer",
        description="a layer: one product of any layout; a block: of a transformer; a step: of the training program",
    )
    layout: str | None = Field(
        default=None, description="of a layer: a layout, or one by name (shardgrad explain --list)"
    )
    bias: bool = Field(default=False, description="of a layer: whether to add one, stored as the layout says")
    keep: list[str] = Field(default=[], description="of a layer: operands kept as gathered from forward to backward")
    train: str | None = Field(default=None, description="of a step: a configuration of launch/train.py")
    set: list[str] = Field(default=[], description="of a step: section.key=value in place of that configuration's")
    sizes: dict[str, _Count] = Field(
        default={},
        description="global sizes: of a layer's letters; of a block: batch, sequence, d, heads; of a step: any of "
        f"{', '.join(STEP)}",
    )
    grow: dict[str, Number] = Field(
        default={},
        description="weak scaling: a size times the ranks to this power (1: in proportion; 0.5: of both sides of a "
        "square matrix)",
    )
    sequence_parallel: bool = Field(default=True, description="of a block: whether rows are cut between its products")
    ranks: int | None = Field(default=None, ge=1, description="processes; null: what the mesh has")
    mesh: dict[str, _Count] | None = Field(
        default=None, description="ranks of each axis, major first; null: one axis with all ranks"
    )
    dtype: Literal["float32", "bfloat16", "float64", "float16"] = Field(default="float32", description="of all tensors")
    overlap: Annotated[_Count | Literal["measured"] | None, BeforeValidator(_off)] = Field(
        default=None,
        description="pieces in which products are cut to hide communication; measured: what the cell's own ranks "
        "measure to pay; off: none",
    )
    backend: str | None = Field(
        default=None, min_length=1, description="of torch.distributed; null: gloo, nccl on cuda"
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where tensors live")
    threads: int = Field(default=1, ge=1, description="threads of a rank's products, on the CPU")
    label: str | None = Field(default=None, min_length=1, description="name of the series in tables and pictures")

    @property
    def key(self) -> str:
        """The same for cells that run the same."""
        text = json.dumps(self.model_dump(exclude={"label", "grow"}), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def on(self) -> dict[str, int]:
        """The mesh of a resolved cell."""
        assert self.mesh is not None
        return self.mesh

    @property
    def world(self) -> int:
        return prod(self.on.values())

    @property
    def product(self) -> Layout:
        """The layout of a resolved layer."""
        assert self.layout is not None
        layout = Layout(self.layout)
        return Layout(f"{layout} + {layout.bias}") if self.bias and not layout.has_bias else layout

    def series(self) -> dict[str, Any]:
        """All but the ranks: what cells of one curve have in common."""
        return self.model_dump(exclude={"ranks", "mesh", "label"})


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
        assert cell.train is not None
        mesh = training.shape(training.read(cell.train, cell.set, sizes, cell.mesh, ranks, cell.dtype, cell.device))
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
    return made


def _layout(cell: Cell) -> Layout | None:
    foreign = {"layer": ("train", "set"), "block": ("layout", "train", "set"), "step": ("layout",)}[cell.kind]
    for key in (*foreign, *(() if cell.kind == "layer" else ("bias", "keep"))):
        if getattr(cell, key):
            raise ConfigError(f"{key} is for another kind of cell than a {cell.kind}")
    if not cell.sequence_parallel and cell.kind != "block":
        where = "write it into the layout" if cell.kind == "layer" else "the training program's model always has it"
        raise ConfigError(f"sequence_parallel is for a block: {where}")
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
    if cell.layout in PRESETS:
        return PRESETS[cell.layout]
    if "[" not in cell.layout:
        raise ConfigError(f"no layout is called {cell.layout!r}; those with a name are {', '.join(PRESETS)}")
    try:
        return Layout(cell.layout)
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
        return cell.ranks
    ranks = prod(cell.mesh.values())
    if cell.ranks not in (None, ranks):
        raise ConfigError(f"mesh = {cell.mesh} has {ranks} ranks, not ranks = {cell.ranks}")
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
        sizes[name] = max(1, round(sizes[name] * ranks**power))
    # A width must divide by the heads; the nearest that does.
    width = {"block": "d", "step": "d_model"}.get(cell.kind)
    if cell.grow and width in sizes and "heads" in sizes:
        sizes[width] = max(1, round(sizes[width] / sizes["heads"])) * sizes["heads"]
    return sizes
