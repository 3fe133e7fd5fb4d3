"""From the arguments of each collective to the bytes that it moves or reduces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .memory import Bytes, memory
from .transfer import Exchange, Reduction, Transfer


def named(word: str, x: Tensor, detail: str = "") -> str:
    """A call in words, as all ranks must say it."""
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{word} of {dtype} {list(x.shape)}{detail}"


def copied(x: Tensor) -> Bytes:
    return memory(x).copy()


def reduced(word: str, x: Tensor, op: Any, keeps: bool) -> Transfer:
    """In place; where the result is not kept, the term must not change."""
    given = _like([x])
    size = x.numel() * x.element_size() if keeps else 0
    kept = [] if keeps else [(x, copied(x))]
    return Reduction(
        named(f"{word} ({op.op.name})", x), given, op, (0, size), [x] if keeps else [], kept, in_place=True
    )


def scattered(out: Tensor, whole: Tensor, op: Any, rank: int) -> Transfer:
    size = out.numel() * out.element_size()
    call = named(f"reduce-scatter ({op.op.name})", whole)
    return Reduction(call, _like([whole]), op, (rank * size, (rank + 1) * size), [out], [(whole, copied(whole))])


def scattered_list(out: Tensor, terms: Sequence[Tensor], op: Any, rank: int) -> Transfer:
    sizes = [term.numel() * term.element_size() for term in terms]
    start = sum(sizes[:rank])
    call = named(f"reduce-scatter ({op.op.name})", terms[0], f" and {len(terms) - 1} more, in bytes {sizes}")
    keeps = start, start + sizes[rank]
    return Reduction(call, _like(terms), op, keeps, [out], [(term, copied(term)) for term in terms])


def gathered(outs: Sequence[Tensor], one: Tensor, ranks: int) -> Transfer:
    """One tensor for the shards of all, or one for each rank's."""
    sizes = [out.numel() * out.element_size() for out in outs]
    takes = sizes if len(outs) == ranks and ranks > 1 else [sizes[0] // ranks] * ranks
    uneven = len(set(takes)) > 1
    call = (
        f"all-gather of {str(one.dtype).removeprefix('torch.')} in bytes {takes}"
        if uneven
        else named("all-gather", one)
    )
    given = copied(one)
    return Exchange(call, [given] * ranks, takes, outs, [(one, given)])


def spread(word: str, x: Tensor, root: int, rank: int, ranks: int) -> Transfer:
    none = np.empty(0, np.uint8)
    if rank == root:
        given = copied(x)
        pieces = [none if other == root else given for other in range(ranks)]
        return Exchange(named(word, x), pieces, [0] * ranks, [], [(x, given)])
    takes = [x.numel() * x.element_size() if other == root else 0 for other in range(ranks)]
    return Exchange(named(word, x), [none] * ranks, takes, [x], [])


def collected(word: str, targets: Sequence[Tensor], one: Tensor, root: int, ranks: int) -> Transfer:
    given, none = copied(one), np.empty(0, np.uint8)
    pieces = [given if other == root else none for other in range(ranks)]
    takes = [target.numel() * target.element_size() for target in targets] or [0] * ranks
    return Exchange(named(word, one), pieces, takes, targets, [(one, given)])


def dealt(word: str, out: Tensor, sources: Sequence[Tensor], root: int, ranks: int) -> Transfer:
    kept = [(source, copied(source)) for source in sources]
    pieces = [copy for _, copy in kept] or [np.empty(0, np.uint8)] * ranks
    takes = [out.numel() * out.element_size() if other == root else 0 for other in range(ranks)]
    return Exchange(named(word, out), pieces, takes, [out], kept)


def swapped(outs: Sequence[Tensor], ins: Sequence[Tensor]) -> Transfer:
    kept = [(x, copied(x)) for x in ins]
    takes = [out.numel() * out.element_size() for out in outs]
    call = f"all-to-all of {str(outs[0].dtype).removeprefix('torch.')}"
    return Exchange(call, [copy for _, copy in kept], takes, outs, kept)


def swapped_rows(
    out: Tensor, whole: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], ranks: int
) -> Transfer:
    """Rows (dim 0) by the rank they go to and come from; equally many for each rank where no splits are given.

    Raises:
        ValueError: the rows cannot be split so.
    """
    given = copied(whole)
    sizes = _split(whole, in_splits, ranks, "input")
    ends = np.cumsum([0, *sizes])
    pieces = [given[start:end] for start, end in itertools.pairwise(ends)]
    call = f"all-to-all of {str(out.dtype).removeprefix('torch.')}"
    return Exchange(call, pieces, _split(out, out_splits, ranks, "output"), [out], [(whole, given)])


def meeting() -> Transfer:
    return Exchange("barrier", [], [], [], [])


def _split(x: Tensor, splits: Sequence[int], ranks: int, which: str) -> list[int]:
    rows, size = x.shape[0] if x.dim() else 0, x.numel() * x.element_size()
    if x.numel() and not splits and rows % ranks:
        raise ValueError(f"all-to-all: {rows} rows of the {which} cannot be split over {ranks} ranks: give splits")
    if splits and (len(splits) != ranks or sum(splits) != rows):
        raise ValueError(f"all-to-all: splits {list(splits)} of the {which} for {rows} rows and {ranks} ranks")
    return [each * (size // max(rows, 1)) for each in splits or [rows // ranks] * ranks]


def _like(terms: Sequence[Tensor]) -> Tensor:
    """A flat copy of tensors, one after another, in the order of their memory."""
    flat = torch.empty(sum(term.numel() for term in terms), dtype=terms[0].dtype)
    memory(flat)[:] = np.concatenate([memory(term) for term in terms])
    return flat
