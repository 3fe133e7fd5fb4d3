"""Where a layer lives and how it is parallel: given once for all layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.errors import ShapeError

if TYPE_CHECKING:
    from shardgrad.layout.batch_axis import BatchAxis


@dataclass(frozen=True, slots=True)
class Parallel:
    """Where layers live and how they are parallel. A model makes one and gives it to all of its layers:

        parallel = sg.Parallel(mesh, sequence_dim=1, dtype=torch.bfloat16)
        layer = sg.RowParallelLinear(75, 30, parallel=parallel)

    A layer takes the same names as keywords of its own as well: `sg.RowParallelLinear(75, 30, mesh=mesh)`.

    Args:
        mesh, axis: the axis of the mesh that shards features, heads or the vocabulary.
        sequence_dim: the dim of x and y (not the last) that the same axis shards between the products (sequence
            parallelism); None if they are replicated there.
        data: the axis that shards the batch, the first dim, and how parameters are stored over it; None without data
            parallelism.
        reduce_dtype: in which partial sums of products are reduced, e.g. torch.float32 for 16-bit operands; None: in
            that of the products, as sums of float64 always are.
        device, dtype: of the parameters; None: the mesh's device, torch's default dtype.

    Raises:
        ShapeError: sequence_dim is the row dim of no input.
    """

    mesh: DeviceMesh = field(repr=False)
    axis: str = "tp"
    sequence_dim: int | None = None
    data: BatchAxis | None = None
    reduce_dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        return (self.axis,) if self.data is None else (self.axis, self.data.axis)

    def __deepcopy__(self, memo: object) -> Parallel:
        return self  # a mesh holds process groups, which cannot be copied

    def __post_init__(self) -> None:
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise TypeError(f"dtype={self.dtype} takes no gradients: parameters are of a floating-point dtype")
        if self.data is not None and not hasattr(self.data, "axis"):
            raise TypeError(f"data must be a sg.BatchAxis, as sg.BatchAxis('dp'), not {self.data!r}")
        if self.sequence_dim is None:
            return
        if not isinstance(self.sequence_dim, int) or isinstance(self.sequence_dim, bool):
            raise ShapeError(f"sequence_dim is the number of a dim, or None; not {self.sequence_dim!r}")
        if self.sequence_dim == -1:
            raise ShapeError("sequence_dim=-1 is not a row dim (the last one holds features)")

    @classmethod
    def of(cls, layer: str, where: Mapping[str, Any], takes: type, axis: str = "tp") -> Parallel:
        """The `Parallel` that a layer was given, by `parallel=` or by keywords.

        Args:
            takes: the TypedDict of the keywords that the layer knows.
            axis: where none is given.

        Raises:
            TypeError: an unknown keyword, one besides parallel=, no mesh; or parallel= shards x in a way that the layer
                knows nothing of.
            ShapeError: as of the class.
        """
        names = takes.__annotations__
        for name in where:
            if name not in names:
                meant = "".join(f" ({one} is meant?)" for one in get_close_matches(name, names, 1))
                raise TypeError(
                    f"{layer} got an unexpected keyword argument {name!r}{meant}: besides its own it takes "
                    f"{', '.join(names)}"
                )
        parallel = where.get("parallel")
        if parallel is None:
            if "mesh" not in where:
                raise TypeError(f"{layer} needs mesh=…, or parallel=sg.Parallel(mesh, …)")
            given = {name: value for name, value in where.items() if name != "parallel"}
            try:
                return cls(**{"axis": axis, **given})
            except ShapeError as wrong:
                raise ShapeError(f"{layer}: {wrong}") from None
        if not isinstance(parallel, Parallel):
            raise TypeError(f"{layer}: parallel is a sg.Parallel, not {type(parallel).__name__}")
        beside = [name for name in where if name != "parallel"]
        if beside:
            raise TypeError(
                f"{layer}: {beside[0]}=… besides parallel=…, which says it already: give one, or make another by "
                f"dataclasses.replace(parallel, {beside[0]}=…)"
            )
        for name in ("sequence_dim", "data") if "axis" in names else ():  # else a layout says all of it
            if name not in names and getattr(parallel, name) is not None:
                raise TypeError(f"{layer} knows no {name}, which parallel= sets to {getattr(parallel, name)!r}")
        return parallel


class OnMesh(TypedDict, total=False):
    """Keywords of a layer whose layout names its axes."""

    parallel: Parallel
    mesh: DeviceMesh
    reduce_dtype: torch.dtype | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class OnAxis(TypedDict, total=False):
    """Keywords of a layer that an axis shards, and that takes whole tensors, or says itself what it shards of them."""

    parallel: Parallel
    mesh: DeviceMesh
    axis: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class OnRows(OnAxis, total=False):
    """Keywords of a layer without products, whose rows may be sharded over the sequence and the batch."""

    sequence_dim: int | None
    data: BatchAxis | None


class Where(OnRows, total=False):
    """Keywords of a layer of products: the fields of `Parallel`."""

    reduce_dtype: torch.dtype | None


assert {"parallel", *(one.name for one in fields(Parallel))} == set(Where.__annotations__)
