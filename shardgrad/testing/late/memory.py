"""The memory of CPU tensors as bytes: read, poisoned and compared past torch, so that no mode, no version counter and
no autograd sees it, as none sees what NCCL's kernels do."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]

# NaN where a dtype has it, with bits of its own, and else a number that nobody computes.
_POISON: dict[torch.dtype, tuple[Any, int]] = {
    torch.float64: (np.uint64, 0x7FF8_0000_0000_1A7E),
    torch.float32: (np.uint32, 0x7FC0_1A7E),
    torch.bfloat16: (np.uint16, 0x7FDA),
    torch.float16: (np.uint16, 0x7EDA),
    torch.int64: (np.uint64, 0x8000_0000_0000_1A7E),
    torch.uint64: (np.uint64, 0x8000_0000_0000_1A7E),
    torch.int32: (np.uint32, 0x8000_1A7E),
    torch.uint32: (np.uint32, 0x8000_1A7E),
    torch.int16: (np.uint16, 0x9A7E),
    torch.uint16: (np.uint16, 0x9A7E),
    torch.complex128: (np.uint64, 0x7FF8_0000_0000_1A7E),
    torch.complex64: (np.uint32, 0x7FC0_1A7E),
    torch.float8_e5m2: (np.uint8, 0x7E),
    torch.float8_e4m3fn: (np.uint8, 0x7F),
    torch.float8_e5m2fnuz: (np.uint8, 0x80),
    torch.float8_e4m3fnuz: (np.uint8, 0x80),
    torch.bool: (np.uint8, 1),
}
_OTHERS = (np.uint8, 0xA5)


def memory(x: Tensor) -> Bytes:
    """The bytes of a dense tensor, in the order in which they lie; writing to them writes to the tensor."""
    if not x.numel() or is_freed(x):
        return np.empty(0, np.uint8)
    size = x.numel() * x.element_size()
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(x.data_ptr()))


def is_freed(x: Tensor) -> bool:
    """Whether a tensor's storage has been resized to less than the tensor needs, as FSDP frees memory."""
    return x.untyped_storage().nbytes() < (x.storage_offset() + _reach(x)) * x.element_size()


def is_dense(x: Tensor) -> bool:
    """Whether the elements lie in one block without holes, in whatever order of the dims."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride()), key=lambda dim: (dim[1], dim[0])):
        if size == 1:
            continue
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True


def poison(x: Tensor) -> None:
    """Fill a dense tensor with what can be told from data: NaN, or a number that is far from all others.

    A bool holds True.
    """
    kind, bits = _POISON.get(x.dtype, _OTHERS)
    memory(x).view(kind)[:] = bits


def is_poisoned(x: Tensor) -> bool:
    """Whether all of a tensor is as `poison` left it, or its memory is gone."""
    kind, bits = _POISON.get(x.dtype, _OTHERS)
    return bool((memory(x).view(kind) == kind(bits)).all())


def span(x: Tensor) -> tuple[int, int]:
    """The first address of a tensor's elements and the one behind the last."""
    if not x.numel():
        return 0, 0
    start = x.data_ptr()
    return start, start + _reach(x) * x.element_size()


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors share an element, of which `y` is dense."""
    (start, end), (first, last) = span(x), span(y)
    if start >= last or first >= end:
        return False
    if is_dense(x):
        return True
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(x.shape, x.stride()):
        if stride:
            offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * (stride * x.element_size())).reshape(-1)
    at = offsets + start
    return bool(((at < last) & (at + x.element_size() > first)).any())


def _reach(x: Tensor) -> int:
    """Elements from the first to behind the last, holes included."""
    if not math.prod(x.shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
