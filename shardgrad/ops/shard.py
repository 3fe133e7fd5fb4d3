"""Shard a global tensor, and assemble the global tensor from the shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.agree import agree
from shardgrad.comm.mesh import view
from shardgrad.errors import ShapeError
from shardgrad.layout.notation import Dim, TensorSpec, parse_tensor
from shardgrad.layout.plan import route
from shardgrad.layout.sizes import slab
from shardgrad.ops import sizing
from shardgrad.ops.namespace import run_route
from shardgrad.ops.size_exchange import exchange


@told
def shard(full: Tensor, spec: TensorSpec | str, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a global tensor, contiguous and of its own memory. No communication.

    `spec` is a tensor of a layout, `layout["W"]`, or its text, "W[d,m/tp]".

    Every dim is sharded as torch.chunk shards, or balanced (`set_balanced`), once for each of its axes, major first.
    Marks (`{axis}`) are not applied: a tensor marked as partial, or whose gradient is, is sharded like any other. The
    result does not require grad.

    Raises:
        ShapeError: `full` has another number of dims than `spec`.
        MeshError: the mesh lacks an axis of `spec`.
    """
    spec = _read(spec)
    mesh_view = view(mesh)
    mesh_view.require(spec.axes, spec)
    if full.dim() != len(spec.dims):
        raise ShapeError(f"{spec} has {len(spec.dims)} dims, but the tensor to shard has shape {tuple(full.shape)}")
    part = full.detach()
    for at, dim in enumerate(spec.dims):
        start, length = slab(full.shape[at], dim.axes, mesh_view.shape, mesh_view.coordinate)
        part = part.narrow(at, start, length)
    return part.clone(memory_format=torch.contiguous_format)


@told
def unshard(local: Tensor, spec: TensorSpec | str, mesh: DeviceMesh, sizes: Mapping[str, int] | None = None) -> Tensor:
    """The global tensor, on every rank: all-gathered over its axes, summed over those it is partial on.

    A product marked `Y[n,m]{tp}` is summed over tp; a gradient is partial where its tensor is marked, so assemble it
    with `layout["X"].grad`. Not differentiable.

        full = unshard(y, layout["Y"], mesh, sizes={"m": 5})

    A tensor that is whole already reads as the shard of a larger one, and is put together with its copies, in silence.
    With its `sizes` said it is an error.

    Args:
        local: this rank's shard, stored as `spec` (in whose text a mark is one of the value, as a product's).
        sizes: global sizes of letters; those missing are exchanged (one small exchange for each axis).

    Raises:
        ShapeError: the shards are not as the mesh shards, or contradict `sizes`.
        DisagreementError: they differ in dtype, or in dims that no axis shards (compared when first seen).
        MeshError: the mesh lacks an axis of `spec`.
    """
    spec = _read(spec)
    mesh_view = view(mesh)
    mesh_view.require((*spec.axes, *spec.partial), spec)
    whole = tuple(Dim(dim.letter) for dim in spec.dims)
    moves = route(spec.dims, whole, spec.partial)
    given = {letter: size for letter, size in (sizes or {}).items() if letter in spec.letters}
    known = sizing.learn([spec], [local], given, mesh_view, spec)
    if len(given) < len(spec.dims):  # else each rank has seen by itself that its shard fits
        whole_dims = [f"{dim.letter} = {size}" for dim, size in zip(spec.dims, local.shape) if not dim.axes]
        said = "\n".join((str(spec), str(local.dtype), *whole_dims))
        for name in dict.fromkeys((*spec.axes, *spec.partial)):
            agree(mesh_view, mesh_view.axes[name], lambda: said, "a tensor to assemble")
    missing = sizing.unknown(moves, known)
    if missing:
        exchange(missing, known, mesh_view, spec)
    reduced = any(move.kind == "all-reduce" for move in moves)  # in place
    full = run_route(local.detach().clone() if reduced else local.detach(), moves, spec.name, mesh_view, known)
    return full.clone() if full.data_ptr() == local.data_ptr() else full.contiguous()


def _read(spec: TensorSpec | str) -> TensorSpec:
    if isinstance(spec, str):
        read = parse_tensor(spec)
        return replace(read, partial=read.grad_partial, grad_partial=())  # here the value is what is partial
    if not isinstance(spec, TensorSpec):
        raise TypeError(f"spec says how one tensor is stored: layout['W'] or 'W[d,m/tp]', not {type(spec).__name__}")
    return spec
