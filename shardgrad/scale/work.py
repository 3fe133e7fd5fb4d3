"""What the ranks of a cell run, step after step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.shim import is_fake
from shardgrad.layout.cost import Collective
from shardgrad.layout.notation import TensorSpec, parse_tensor
from shardgrad.layout.sizes import slab
from shardgrad.nn import init
from shardgrad.ops.matmul import matmul
from shardgrad.ops.measured_costs import measure_costs
from shardgrad.ops.overlap import set_overlap
from shardgrad.scale.block import Block, flops
from shardgrad.scale.cell import Cell


@dataclass(frozen=True)
class Work:
    """step: forward and backward, for a training step the update too.

    predicted: what this rank sends in a step. flops: of a step on all ranks together. tokens: rows of the whole input.
    stored: this rank's parameters, by name, and inputs that stay. optimizer: whose moments are memory too.
    """

    step: Callable[[], None]
    predicted: list[Collective]
    flops: float
    tokens: int
    stored: dict[str, Tensor]
    optimizer: torch.optim.Optimizer | None = None


def make_mesh(cell: Cell) -> DeviceMesh:
    return init_device_mesh(cell.device, tuple(cell.on.values()), mesh_dim_names=tuple(cell.on))


def make(cell: Cell, mesh: DeviceMesh, seed: int) -> Work:
    """Build what a resolved cell says, on this rank. Values are the same global tensors on any mesh."""
    torch.manual_seed(seed)
    if cell.overlap is not None:
        dtype = getattr(torch, cell.dtype)
        set_overlap(mesh, measure_costs(mesh, (dtype,)) if cell.overlap == "measured" else cell.overlap)
    return {"layer": _layer, "block": _block, "step": _step}[cell.kind](cell, mesh, seed)


def _layer(cell: Cell, mesh: DeviceMesh, seed: int) -> Work:
    layout, mesh_view = cell.product, view(mesh)
    specs = [layout.lhs, layout.rhs, *([layout.bias] if layout.has_bias else [])]
    operands = [_part(spec, cell, mesh_view, seed + at) for at, spec in enumerate(specs)]
    for operand in operands:
        operand.requires_grad_()
    x, w, *bias = operands
    grad = _part(layout.out, cell, mesh_view, seed + len(specs))
    sizes = {letter: cell.sizes[letter] for letter in layout.letters}

    def step() -> None:
        for operand in operands:
            operand.grad = None
        matmul(x, w, layout, mesh, bias[0] if bias else None, sizes, save_gathered=cell.keep).backward(grad)

    predicted = layout.collectives(
        sizes, mesh_view.shape, cell.dtype, save_gathered=cell.keep, coordinate=mesh_view.coordinate
    )
    stored = {spec.name: operand for spec, operand in zip(specs, operands)} | {f"d{layout.out.name}": grad}
    rows = prod(sizes[letter] for letter in (*layout.rows, *layout.batched))
    return Work(step, predicted, 6 * prod(sizes.values()), rows, stored)


def _part(spec: TensorSpec, cell: Cell, mesh_view: MeshView, seed: int) -> Tensor:
    """This rank's part of a random tensor, uniform in [-1, 1)."""
    shape = [cell.sizes[letter] for letter in spec.letters]
    slabs = [slab(size, dim.axes, mesh_view.shape, mesh_view.coordinate) for dim, size in zip(spec.dims, shape)]
    starts, lengths = [start for start, _ in slabs], [length for _, length in slabs]
    part = torch.empty(lengths, dtype=getattr(torch, cell.dtype), device=mesh_view.device)
    return part if is_fake(part) else part.copy_(init.uniform(1.0, seed, shape, starts, lengths))


def _block(cell: Cell, mesh: DeviceMesh, seed: int) -> Work:
    batch, sequence, d = (cell.sizes[name] for name in ("batch", "sequence", "d"))
    dtype, mesh_view = getattr(torch, cell.dtype), view(mesh)
    block = Block(d, cell.sizes["heads"], mesh=mesh, sequence_parallel=cell.sequence_parallel, dtype=dtype)
    spec = "X[batch,sequence/tp,d]" if cell.sequence_parallel else "X[batch,sequence,d]"
    x, grad = (_part(parse_tensor(spec), cell, mesh_view, seed + at) for at in range(2))
    x.requires_grad_()

    def step() -> None:
        block.zero_grad()
        x.grad = None
        block(x, sequence).backward(grad)

    predicted = block.collectives(batch, sequence, dtype)
    stored = dict(block.named_parameters()) | {"X": x, "dY": grad}
    return Work(step, predicted, flops(batch, sequence, d), batch * sequence, stored)


def _step(cell: Cell, mesh: DeviceMesh, seed: int) -> Work:
    from shardgrad.scale import training  # takes its time, and its libraries

    config = training.read(cell, cell.sizes, cell.world)
    made = training.make(config, mesh)
    stored = {
        f"{group}.{at}": parameter
        for group, one in enumerate(made.optimizer.param_groups)
        for at, parameter in enumerate(one["params"])
    }
    return Work(made.step, made.predicted, made.flops, made.tokens, stored, made.optimizer)
