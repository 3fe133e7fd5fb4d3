"""Gradients of 16-bit parameters, summed in float32: straight into a buffer that stays, `parameter.main_grad`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.arguments import told
from shardgrad.ops import modes


@told
def use_main_grads(parameters: Iterable[nn.Parameter], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Give each parameter a `main_grad` of zeros, to which backward adds its gradient from then on; `.grad` stays None.

    A weight of a product has its gradient added as the product is made: no 16-bit gradient is stored (on CUDA, its
    sums leave the multiplier in float32; on CPUs they are rounded once, as they would be without). Other gradients,
    such as of norms, are added when autograd has them. The name is Megatron's. The optimizer's step
    has to read `main_grad`, and to set it to zero.

    Returns:
        The buffers, shaped as the local parameters, one for each that is trained.
    """
    buffers = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if getattr(parameter, "main_grad", None) is None:
            parameter.main_grad = torch.zeros_like(parameter, dtype=dtype)  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_add)
        buffers.append(parameter.main_grad)  # type: ignore[attr-defined]
    modes.main_grads.append(None)
    return buffers


def _add(parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None


def buffers_of(node: Any) -> dict[int, Tensor]:
    """The buffers of a node's leaf inputs, by position."""
    leaves = {at: getattr(entry[0], "variable", None) for at, entry in enumerate(node.next_functions)}
    found = {at: getattr(leaf, "main_grad", None) for at, leaf in leaves.items()}
    return {at: buffer for at, buffer in found.items() if buffer is not None}
