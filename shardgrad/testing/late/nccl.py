"""What NCCL's process group refuses, with its words (torch's ProcessGroupNCCL, 2.13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import is_dense
from .place import here

_NO_TYPE = (torch.int16, torch.uint16, torch.uint32, torch.uint64)
_NO_REDUCTION = ("BAND", "BOR", "BXOR")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def check_tensors(call: str, tensors: Sequence[Tensor], larger: tuple[Tensor, Tensor, int] | None = None) -> None:
    """Refuse what NCCL refuses of single tensors. larger: one that must have so many times another's elements.

    Raises:
        ValueError: with NCCL's words and the line.
    """
    for x in tensors:
        _check_kind(call, x)
        if not _is_contiguous(x):
            _refuse("Tensors must be contiguous", call, f"{list(x.shape)}, strides {list(x.stride())}")
        if x.dtype != tensors[0].dtype:
            _refuse("tensors must have the same type", call, f"{x.dtype} beside {tensors[0].dtype}")
    if larger is not None and larger[0].numel() != larger[1].numel() * larger[2]:
        whole, part, ranks = larger
        _refuse(
            "the larger tensor's size must be equal to world_size times the smaller one's",
            call,
            f"{list(whole.shape)}, {ranks} ranks, {list(part.shape)}",
        )


def check_lists(call: str, one: Tensor, listed: Sequence[Tensor], count: int, *same: Tensor) -> None:
    """Refuse what NCCL refuses of a tensor and a list. same: two that must have one size.

    Raises:
        ValueError: with NCCL's words and the line.
    """
    check_tensors(call, [one])
    if len(listed) != count:
        _refuse("Tensor list must have one tensor for each rank", call, f"{len(listed)}, {count} wanted")
    for x in listed:
        _check_kind(call, x)
        if x.dtype != one.dtype:
            _refuse("Tensors must have identical type", call, f"{x.dtype} beside {one.dtype}")
        if not is_dense(x):
            _refuse("Tensors must be non-overlapping and dense", call, f"{list(x.shape)}, strides {list(x.stride())}")
    if same and same[0].numel() != same[1].numel():
        _refuse("Tensors must have the same size", call, f"{list(same[0].shape)} beside {list(same[1].shape)}")


def check_reduction(call: str, op: Any, tensors: Sequence[Tensor]) -> None:
    """Refuse reductions that NCCL has not.

    Raises:
        ValueError: with NCCL's words and the line.
    """
    if op.name in _NO_REDUCTION:
        _refuse(f"Cannot use ReduceOp.{op.name} with NCCL", call, str(tensors[0].dtype))
    for x in tensors:
        if x.dtype is torch.bool and op.name == "AVG":
            _refuse("Cannot use ReduceOp.AVG with boolean inputs", call, str(list(x.shape)))
        if x.dtype in _FLOAT8:
            _refuse("Float8 dtypes are not currently supported for NCCL reductions", call, str(x.dtype))


def _check_kind(call: str, x: Tensor) -> None:
    if x.device.type != "cpu":
        _refuse("the late backend stands in for NCCL on the CPU", call, f"a tensor of {x.device}")
    if x.layout is not torch.strided:
        _refuse("Tensors must be CUDA and dense", call, str(x.layout))
    if x.dtype in _NO_TYPE:
        _refuse("Unconvertible NCCL type", call, str(x.dtype))


def _is_contiguous(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    channels = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return channels is not None and x.is_contiguous(memory_format=channels)


def _refuse(words: str, call: str, what: str) -> None:
    raise ValueError(f"{words} ({call}: {what}), as NCCL says; at {here()}")
