"""What a collective is given: checked against the number of ranks, and parted for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardgrad.comm.shm.errors import ShmError
from shardgrad.comm.shm.tensors import dtype_name


def check_count(tensors: Sequence[Tensor], ranks: int, what: str) -> None:
    """One tensor for each rank."""
    if len(tensors) != ranks:
        raise ShmError(f"{what}: {len(tensors)} for {ranks} ranks")


def check_numel(what: str, a: Tensor, b: Tensor) -> None:
    """As many elements in this rank's input, b, as in its place in the output, a."""
    if a.numel() != b.numel():
        raise ShmError(f"{what}: this rank's input has {b.numel()} elements, its place in the output {a.numel()}")


def check_dtype(what: str, dtype: torch.dtype, tensors: Sequence[Tensor]) -> None:
    """One dtype in a call."""
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise ShmError(f"{what}: tensors of {dtype_name(dtype)} and of {dtype_name(tensor.dtype)} in one call")


def equal_parts(whole: Tensor, one: Tensor, ranks: int, what: str) -> list[Tensor]:
    """The whole, flat, in a part for each rank, with as many elements as `one`."""
    n = one.numel()
    if whole.numel() != n * ranks:
        raise ShmError(f"{what}: {whole.numel()} elements for {ranks} ranks, but {n} elements for one")
    return [whole[r * n : (r + 1) * n] for r in range(ranks)] if ranks > 1 else [whole]


def parts_of(flat: Tensor, shaped: Tensor, splits: Sequence[int], ranks: int, which: str) -> list[Tensor]:
    """A tensor, flat, in a part for each rank: so many rows of its shape, or equally many where no splits are given."""
    rows = shaped.shape[0] if shaped.dim() else 1
    if not splits:
        if rows % ranks:
            raise ShmError(f"all-to-all: dim 0 of the {which}, {rows}, does not divide by {ranks} ranks; give splits")
        splits = [rows // ranks] * ranks
    if len(splits) != ranks or sum(splits) != rows or min(splits) < 0:
        raise ShmError(f"all-to-all: {which} splits {list(splits)} do not split dim 0, {rows}, for {ranks} ranks")
    each = flat.numel() // rows if rows else 0
    return list(flat.split([each * split for split in splits]))


def as_bytes(flat: Tensor) -> Tensor:
    """The elements as bytes, in the same memory."""
    # Of an empty tensor any stride is contiguous, but not to view().
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def one_or_all(sizes: Sequence[int]) -> int | tuple[int, ...]:
    """Sizes as a message writes them: one number where they are equal."""
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
