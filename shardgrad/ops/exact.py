"""Exact mode: products and layers whose bits do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.agree import agree
from shardgrad.comm.mesh import MeshView, slices_of, view
from shardgrad.comm.pieces import CHECK, KEY, exact, refuse_exact
from shardgrad.errors import LayoutError, MeshError, ShapeError
from shardgrad.layout.exact import uneven
from shardgrad.layout.layout import Layout
from shardgrad.layout.lower import Products
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.sizes import Sizes
from shardgrad.ops.exact_optimizers import watch_optimizers
from shardgrad.ops.origin import check_origin
from shardgrad.ops.overlap import is_set

_THREADS = "exact: threads"


@told
def set_exact(mesh: DeviceMesh, pieces: Mapping[str, int] | int | None, *, threads: int = 1) -> None:
    """From now on, what is computed on this mesh has the same bits on every number of ranks that divides `pieces`.

        sg.set_exact(mesh, {"tp": 8, "dp": 4})

    Every letter that an axis splits is computed in so many pieces, whatever the ranks, and sums are taken in one binary
    tree. Promised on one type of machine, with the same versions of libraries and the same threads a rank; what cannot
    be exact raises. Call it alike on all ranks, before the first call.

    Args:
        pieces: V of each axis, or one number for all. The ranks of the axis divide it, and it divides every size that
            the axis splits. An axis that is not named has as many pieces as ranks: it is exact for this number alone.
            None: no longer.
        threads: of each rank on CPUs, which must be as many in all runs whose bits are compared; torchrun gives several
            ranks one each, but one rank alone all cores.

    What no graph is recorded of is not looked at: functions of a rank's shard under torch.no_grad, and behind the last
    layer.

    Raises:
        MeshError: the mesh has no such axis, or more ranks on it than pieces, or a number that does not divide them.
        ValueError: overlap is set on the mesh, or this rank has another number of threads.
        DisagreementError: ranks came with other pieces, or with other numbers of threads.
        LayoutError: layers have been called on a slice of this mesh, `mesh["tp"]`, where it is not set.
    """
    mesh_view = view(mesh)
    if pieces is None:
        mesh_view.settings.pop(KEY, None)
    else:
        made = _checked(mesh_view, pieces)
        if is_set(mesh_view):
            raise ValueError(
                "overlap is set on this mesh: it splits products into chunks, which may be rounded otherwise. Take it "
                "back first, with sg.set_overlap(mesh, None)"
            )
        text = "\n".join((f"pieces {made}", f"{torch.get_num_threads()} threads, of {threads}"))
        for axis in mesh_view.axes.values():
            agree(mesh_view, axis, lambda: text, "exact mode")
        check_threads(mesh_view, threads)
        mesh_view.settings.update({KEY: made, _THREADS: threads, CHECK: check_origin})
    for each in (mesh_view, *slices_of(mesh)):
        for bound in each.bound.values():
            bound.use_settings()


def check_threads(mesh_view: MeshView, threads: int) -> None:
    """Raise if this rank's CPU would share calls out among another number of threads.

    Raises:
        ValueError: it would.
    """
    here = torch.get_num_threads()
    if mesh_view.device.type == "cpu" and here != threads:
        raise ValueError(
            f"exact mode: this rank has {here} threads, but bits are those of {threads} a rank. Call "
            f"torch.set_num_threads({threads}) first, or set OMP_NUM_THREADS={threads} (torchrun gives one rank alone "
            f"all cores); or compare runs that all have {here}: sg.set_exact(…, threads={here})"
        )


def _checked(mesh_view: MeshView, pieces: Mapping[str, int] | int) -> dict[str, int]:
    given = dict.fromkeys(mesh_view.axes, pieces) if isinstance(pieces, Integral) else pieces
    if not isinstance(given, Mapping):
        raise TypeError(f"set_exact takes pieces by axis, such as {{'tp': 8}}, a number, or None, not {pieces!r}")
    mesh_view.require(given, "set_exact")
    made = dict(mesh_view.shape)
    for name, count in given.items():
        ranks = mesh_view.shape[name]
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
            raise TypeError(f"set_exact: the pieces of axis {name!r} are a whole number of at least 1, not {count!r}")
        if count < ranks or count % ranks:
            raise MeshError(
                f"set_exact: axis {name!r} has {ranks} ranks, which do not divide {count} pieces: each rank holds as "
                f"many. Take a multiple of {ranks}"
            )
        made[name] = int(count)
    return made


def refuse_graph(mesh_view: MeshView, name: str) -> None:
    """Raise in exact mode, for a graph of torch.compile.

    Raises:
        LayoutError: it is set.
    """
    if exact(mesh_view) is not None:
        raise LayoutError(
            "exact mode (sg.set_exact) cannot promise anything of a graph of torch.compile, which rounds what it fuses "
            f"otherwise: run {name} outside of it"
        )


def checked(call: Callable[..., Any], specs: Sequence[TensorSpec], mesh_view: MeshView) -> Callable[..., Any]:
    """A call that first looks where its operands come from (see `check_origin`).

    specs: of the input, the weights, the biases that there are.
    """
    pieces = exact(mesh_view) or {}
    cut = [[axis for axis in spec.axes if pieces[axis] > 1] for spec in specs]
    counts = [prod(pieces[axis] // mesh_view.shape[axis] for axis in axes) if axes else 0 for axes in cut]

    def call_checked(*operands: Tensor) -> Any:
        check_threads(mesh_view, mesh_view.settings[_THREADS])
        for operand, count in zip(operands, counts):
            if count and operand.grad_fn is not None:
                check_origin(operand, count)
        watch_optimizers([one for one in operands[1:] if one.is_leaf], mesh_view)
        return call(*operands)

    return call_checked


def sizes_of_pieces(products: Products, layouts: Sequence[Layout], mesh_view: MeshView) -> Sizes:
    """The sizes of single pieces, as a rank has them if there are as many ranks as pieces.

    Raises:
        LayoutError: what the products leave to the caller has no pieces.
        ShapeError: pieces do not divide a size.
    """
    pieces, sizes, name = products.pieces or {}, products.sizes, "; ".join(map(str, layouts))
    for layout in layouts:
        for tensor in layout.tensors:
            axes = (*tensor.partial, *tensor.grad_partial)
            refuse_exact(mesh_view, axes, f"the sum that {layout} leaves to the caller", "leave out the mark {…}")
    found = uneven(products)
    if found is not None:
        level, size, count = found
        raise ShapeError(
            f"exact mode: {level} = {size} is not {count} equal pieces (in {name}): the pieces of an axis, "
            f"{dict(pieces)}, divide every size that it splits"
        )
    whole = Sizes(pieces, dict.fromkeys(pieces, 0))
    for plan in products.plans:
        for letter, axes in plan.splitting.items():
            local = sizes.get(letter, axes)
            if local is not None:
                whole.known[letter, ()] = local * prod(sizes.shape[axis] for axis in axes)
    return whole
