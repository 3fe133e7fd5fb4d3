"""A cell without its machines: one rank of it is built and takes a step, in shapes alone."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from shardgrad.bench.memory import kept_bytes
from shardgrad.comm import shim
from shardgrad.comm.trace import trace_collectives
from shardgrad.layout.units import Aligned
from shardgrad.scale import work
from shardgrad.scale.cell import Cell
from shardgrad.scale.config import Planned
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


DISPENSABLE = ("gradients", "moments")


def columns(found: Sequence[tuple[Planned, Rehearsed]]) -> dict[str, list[str]]:
    """The table, cells by heading; without columns of which no rank has any."""
    ones = [one for _, one in found]
    held = {
        "stored": [one.parameters for one in ones],
        "gradients": [one.gradients for one in ones],
        "moments": [one.moments for one in ones],
        "saved": [one.saved for one in ones],
    }
    made = {name: amounts for name, amounts in held.items() if any(amounts)}
    made["all"] = [sum(amounts) for amounts in zip(*held.values())]
    unit = Aligned.of([amount for amounts in made.values() for amount in amounts])
    work, sent = Aligned.of([one.flops_per_rank for one in ones]), [sum(one.traced.values()) for one in ones]
    moved = Aligned.of(sent)
    return {
        "cell": [planned.name for planned, _ in found],
        **{f"{name}\n{unit.prefix}B": [unit.text(amount) for amount in amounts] for name, amounts in made.items()},
        f"{work.prefix}FLOP": [work.text(one.flops_per_rank) for one in ones],
        f"sent\n{moved.prefix}B": [
            moved.text(count) + ("" if one.predicted == one.traced else " !") for count, one in zip(sent, ones)
        ],
    }


def _rehearsed(made: work.Work, rank: int, cell: Cell) -> Rehearsed:
    made.step()  # the first step's comparisons between ranks are not part of the others
    with trace_collectives() as traced:
        saved = kept_bytes(made.step, made.stored.values())
    parameters = [tensor for tensor in made.stored.values() if tensor.requires_grad]
    moments = [
        value
        for state in (made.optimizer.state.values() if made.optimizer is not None else ())
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return Rehearsed(
        rank=rank,
        shapes={name: list(tensor.shape) for name, tensor in made.stored.items()},
        parameters=sum(map(_bytes, made.stored.values())),
        gradients=sum(_bytes(tensor.grad) for tensor in parameters if tensor.grad is not None),
        moments=sum(map(_bytes, moments)),
        saved=saved,
        predicted=by_kind((one.operation, one.axis, one.bytes) for one in made.predicted),
        traced=by_kind((one.operation, one.axis, one.bytes) for one in traced),
        counts=by_kind((one.operation, one.axis, 1) for one in traced),
        flops_per_rank=made.flops / cell.world,
        tokens=made.tokens,
    )


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
