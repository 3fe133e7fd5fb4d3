"""Torch's tensors as what is moved: their elements, flat, and how messages speak of them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from shardgrad.comm.shm.errors import ShmError


def flat_input(tensor: Tensor) -> Tensor:
    """The tensor's elements, flat; a copy only if they are not contiguous."""
    if not tensor.is_cpu or tensor.layout != torch.strided or tensor.is_quantized:
        raise ShmError(
            f"the shm backend moves dense CPU tensors, not one of {tensor.layout} on {tensor.device}: use nccl for "
            "CUDA tensors, gloo for sparse ones"
        )
    # .data: like other backends, no part in autograd and no new version of the tensor.
    data = tensor.data.resolve_conj() if tensor.is_complex() else tensor.data
    if not data.is_contiguous():
        data = data.contiguous()
    return data if data.dim() == 1 else data.view(-1)


def flat_output(tensor: Tensor, outputs: list[tuple[Tensor, Tensor]], filled: bool = False) -> Tensor:
    """The same for a tensor to be written; of one that is not contiguous, a stand-in, noted in `outputs`."""
    if tensor.is_contiguous() and not (tensor.is_complex() and tensor.is_conj()):
        return flat_input(tensor)
    flat = flat_input(tensor) if filled else torch.empty_like(flat_input(tensor))
    outputs.append((tensor.data, flat))
    return flat


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def words(what: str, how: str, count: object, dtype: torch.dtype, peer: str = "") -> str:
    return f"{what}{f' ({how})' if how else ''} of {count} {dtype_name(dtype)}{peer}"
