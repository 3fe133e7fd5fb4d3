"""One cell of an experiment: what is run, on which ranks."""

from __future__ import annotations

import hashlib
import json
from math import prod
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from shardgrad.layout.layout import Layout
from shardgrad.settings import Number, Section

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


_Count = Annotated[int, Field(ge=1, le=2**48)]


class Cell(Section):
    kind: Literal["layer", "block", "step"] = Field(
        default="layer",
        description="a layer: one product of any layout; a block: of a transformer; a step: of the training program",
    )
    layout: str | None = Field(
        default=None, description="of a layer: a layout, or one by name (shardgrad explain lists them)"
    )
    bias: bool = Field(default=False, description="of a layer: whether to add one, stored as the layout says")
    keep: list[str] = Field(default=[], description="of a layer: operands kept as gathered from forward to backward")
    train: str | None = Field(default=None, description="of a step: a training configuration")
    set: list[str] = Field(default=[], description="of a step: section.key=value in place of that configuration's")
    sizes: dict[str, _Count] = Field(
        default={},
        description="global sizes: of a layer's letters; of a block: batch, sequence, d, heads; of a step: any of "
        f"{', '.join(STEP)}",
    )
    grow: dict[str, Annotated[Number, Field(ge=-8, le=8)]] = Field(
        default={},
        description="weak scaling: a size times the ranks to this power (1: in proportion; 0.5: of both sides of a "
        "square matrix)",
    )
    sequence_parallel: bool = Field(
        default=True, description="of a block or a step: whether rows are sharded between its products"
    )
    ranks: _Count | None = Field(default=None, description="processes; null: what the mesh has")
    mesh: dict[str, _Count] | None = Field(
        default=None, description="ranks of each axis, major first; null: one axis with all ranks"
    )
    dtype: Literal["float32", "bfloat16", "float64", "float16"] = Field(default="float32", description="of all tensors")
    overlap: Annotated[_Count | Literal["measured"] | None, BeforeValidator(_off)] = Field(
        default=None,
        description="chunks in which products are done to hide communication; measured: what the cell's own ranks "
        "measure to pay; off: none",
    )
    backend: str | None = Field(
        default=None, min_length=1, description="of torch.distributed; null: gloo, nccl on cuda"
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where tensors live")
    threads: int = Field(default=1, ge=1, le=1024, description="threads of a rank's products, on the CPU")
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

    def elements(self) -> int:
        """How many elements the operands and the product of a resolved layer have, or a block's weights and rows; 0 of
        a step, whose configuration says its sizes."""
        sizes = self.sizes
        if self.kind == "layer":
            return sum(prod(sizes[x] for x in t.letters) for t in self.product.tensors)
        if self.kind == "block":
            return 12 * sizes["d"] ** 2 + 4 * sizes["batch"] * sizes["sequence"] * sizes["d"]
        return 0

    @property
    def product(self) -> Layout:
        """The layout of a resolved layer."""
        assert self.layout is not None
        layout = Layout(self.layout)
        return Layout(f"{layout} + {layout.bias}") if self.bias and not layout.has_bias else layout

    def series(self) -> dict[str, Any]:
        """All but the ranks: what cells of one curve have in common."""
        return self.model_dump(exclude={"ranks", "mesh", "label"})
