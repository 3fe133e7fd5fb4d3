"""Ranks of a cell that have no part of something, though the mesh has them."""

from __future__ import annotations

from shardgrad.layout import idle
from shardgrad.scale.cell import Cell


def notes(cell: Cell) -> list[str]:
    """`960 of 1,024 ranks have no head (64/1,024)`: of a resolved cell; nothing where every rank has a part of all."""
    if cell.kind == "layer":
        return idle.notes(cell.product, cell.sizes, cell.on)
    parts = _block(cell) if cell.kind == "block" else _step(cell)
    return list(filter(None, (idle.describe(size, name, axes, cell.on) for name, size, axes in parts)))


def _block(cell: Cell) -> list[tuple[str, int, tuple[str, ...]]]:
    sizes, rows = cell.sizes, [("position", cell.sizes["sequence"], ("tp",))] if cell.sequence_parallel else []
    return [("head", sizes["heads"], ("tp",)), ("hidden feature", 4 * sizes["d"], ("tp",)), *rows]


def _step(cell: Cell) -> list[tuple[str, int, tuple[str, ...]]]:
    from shardgrad.scale import training  # takes its time, and its libraries

    config = training.read(cell, cell.sizes, cell.world)
    return training.parts(config)
