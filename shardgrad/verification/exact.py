"""A step in float64 throughout, also where the program computes in float32 (a softmax, a norm)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.models.flow import tensors_in

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class InFloat64(shim.TorchDispatchMode):
    """Inside the block, what is asked for in a narrower floating dtype is made in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        if func is shim.GROUPED_MM and args[0].dtype == torch.float64:
            return grouped_mm(*args, **kwargs)
        result = func(*args, **kwargs)
        made = isinstance(result, Tensor) and result.dtype in _NARROW
        if made and not tensors_in((args, kwargs)):
            return result.double()  # of the default dtype
        return result


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """What torch._grouped_mm, which takes no float64, computes: a product for each group of rows, columns or terms.

    offs: where each group ends, along the dim that the operands of two dims share with the groups.
    """
    if offs is None:
        return a @ b
    ends = offs.tolist()
    groups = list(enumerate(zip([0, *ends[:-1]], ends)))
    if a.dim() == b.dim():
        return torch.stack([a[:, start:end] @ b[start:end] for _, (start, end) in groups])
    if a.dim() == 2:
        rows = [a[start:end] @ b[at] for at, (start, end) in groups]
        return torch.cat([*rows, a.new_zeros(len(a) - ends[-1], b.shape[-1])])
    columns = [a[at] @ b[:, start:end] for at, (start, end) in groups]
    return torch.cat([*columns, b.new_zeros(a.shape[1], b.shape[1] - ends[-1])], -1)
