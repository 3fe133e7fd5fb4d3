"""A cell without its machines: one rank of it is built and takes a step, in shapes alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.trace import trace
from shardgrad.scale import work
from shardgrad.scale.cell import Cell
from shardgrad.scale.measure import by_kind


@dataclass(frozen=True)
class Rehearsed:
    """What one rank of a cell would hold and send.

    shapes: of its parameters and inputs. parameters, gradients, moments, saved: bytes of the tensors that it keeps,
    saved: those that forward keeps for backward, less the parameters among them.
    predicted, traced: bytes sent in one step, by operation and axis.
    """

    rank: int
    shapes: dict[str, list[int]]
    parameters: int
    gradients: int
    moments: int
    saved: int
    predicted: dict[str, int]
    traced: dict[str, int]
    counts: dict[str, int]
    flops_per_rank: float
    tokens: int


def rehearse(cell: Cell, rank: int, seed: int = 0) -> Rehearsed:
    """Take two steps as one rank of a resolved cell, on torch's `fake` backend; nothing is allocated or computed.

    Raises:
        ValueError: the cell has no such rank.
    """
    if not 0 <= rank < cell.world:
        raise ValueError(f"rank {rank} is not one of the {cell.world} ranks of {cell.on}")
    imagined = cell.model_copy(
        update={"device": "cpu", "overlap": None if cell.overlap == "measured" else cell.overlap}
    )
    shim.join_imagined(rank, cell.world)
    try:
        mesh = work.make_mesh(imagined)
        with shim.without_memory():
            return _rehearsed(work.make(imagined, mesh, seed), rank, cell)
    finally:
        dist.destroy_process_group()
        gc.collect()


def _rehearsed(made: work.Work, rank: int, cell: Cell) -> Rehearsed:
    made.step()  # the first step's comparisons between ranks are not part of the others
    with trace() as traced, _saved(made.stored.values()) as saved:
        made.step()
    parameters = [tensor for tensor in made.stored.values() if tensor.requires_grad]
    moments = [
        value
        for state in (made.optimizer.state.values() if made.optimizer is not None else ())
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    counts: dict[str, int] = {}
    for event in traced:
        name = f"{event.operation} over {event.axis}"
        counts[name] = counts.get(name, 0) + 1
    return Rehearsed(
        rank=rank,
        shapes={name: list(tensor.shape) for name, tensor in made.stored.items()},
        parameters=sum(map(_bytes, made.stored.values())),
        gradients=sum(_bytes(tensor.grad) for tensor in parameters if tensor.grad is not None),
        moments=sum(map(_bytes, moments)),
        saved=saved["bytes"],
        predicted=by_kind((one.operation, one.axis, one.bytes) for one in made.predicted),
        traced=by_kind((one.operation, one.axis, one.bytes) for one in traced),
        counts=dict(sorted(counts.items())),
        flops_per_rank=made.flops / cell.world,
        tokens=made.tokens,
    )


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def _saved(stored: Any) -> Iterator[dict[str, int]]:
    """Count the bytes that forward saves for backward: each storage once, those of stored tensors not."""
    total = {"bytes": 0}
    seen = {shim.storage_number(tensor) for tensor in stored}
    alive: list[Tensor] = []  # so that no storage is freed and its number given to another

    def pack(x: Tensor) -> Tensor:
        where = shim.storage_number(x)
        if where not in seen:
            seen.add(where)
            alive.append(x)
            total["bytes"] += x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield total
