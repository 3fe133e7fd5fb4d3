"""The sums of a cross-entropy in exact mode: over pieces of the vocabulary, and of the tokens, in a tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.agree import agree
from shardgrad.comm.first_derivatives import FirstDerivativeOnly
from shardgrad.comm.mesh import Axis, view, view_of
from shardgrad.comm.pieces import level_of, pieces_here, reduce_pieces
from shardgrad.errors import LayoutError
from shardgrad.ops.in_pieces import compact, piece


def sums_of_pieces(
    picked: Sequence[Tensor], terms: Iterable[Tensor], vocab_size: int, over: Axis, blocks: int, what: str
) -> Tensor:
    """What each token has of the whole vocabulary: each of picked [...], which one rank of the axis has, and the sums
    over the last dim of each of terms [..., v/tp], which are gone through one after the other.

    blocks: the pieces of the tokens, so that a call sums as many rows whatever the ranks.

    Returns:
        [picked + terms, ...].

    Raises:
        LayoutError: pieces divide neither the tokens nor the vocabulary.
    """
    mesh_view = view_of(over)
    columns = pieces_here(mesh_view, over.name)
    values: list[list[Tensor]] = [
        [one.reshape(-1) if at == 0 else torch.zeros_like(one.reshape(-1)) for one in picked] for at in range(columns)
    ]
    shape = torch.Size()
    for term in terms:
        shape, size, whole = term.shape[:-1], term.shape[-1], columns * over.size
        if vocab_size % whole or shape.numel() % blocks:
            raise LayoutError(
                f"exact mode: {vocab_size} words are to be {whole} equal pieces, and a rank's {shape.numel()} tokens "
                f"{blocks}: the pieces of an axis divide every size that it splits"
            )
        flat = term.reshape(shape.numel(), size)
        for at, sums in enumerate(values):
            rows = [compact(piece(flat, (block, at), (blocks, columns))).sum(-1) for block in range(blocks)]
            sums.append(torch.cat(rows))
    total = reduce_pieces([torch.stack(sums) for sums in values], [level_of(mesh_view, over.name)], mesh_view, what)
    return total.view(len(values[0]), *shape)


def sum_of_tokens(losses: Tensor, mesh: DeviceMesh, axes: Sequence[str]) -> Tensor:
    """The sum over the tokens of all ranks of some axes, which shard the first dim, major first.

    Raises:
        LayoutError: pieces do not divide the tokens.
    """
    blocks = prod(pieces_here(view(mesh), axis) for axis in axes)
    text = f"{losses.numel()} tokens of a rank"
    for axis in axes:
        agree(view(mesh), view(mesh).axes[axis], lambda: text, "a loss over pieces of one size")
    if losses.numel() % blocks:
        raise LayoutError(f"exact mode: the {losses.numel()} tokens of a rank are to be {blocks} equal pieces")
    total: Tensor = _Total.apply(losses, mesh, tuple(axes), blocks)
    return total


class _Total(FirstDerivativeOnly):
    what = "vocab_parallel_cross_entropy"

    @staticmethod
    def forward(ctx: Any, losses: Tensor, mesh: DeviceMesh, axes: tuple[str, ...], blocks: int) -> Tensor:
        ctx.shape = losses.shape
        mesh_view = view(mesh)
        flat = losses.reshape(-1)
        sums = [block.sum() for block in flat.split(flat.numel() // blocks)] if flat.numel() else [flat.sum()] * blocks
        levels = [level_of(mesh_view, *reversed(axes))] if axes else []
        return reduce_pieces(sums, levels, mesh_view, "all-reduce of the sum of losses")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.expand(ctx.shape), None, None, None
