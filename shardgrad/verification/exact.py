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
        result = func(*args, **kwargs)
        made = isinstance(result, Tensor) and result.dtype in _NARROW
        if made and not tensors_in((args, kwargs)):
            return result.double()  # of the default dtype
        return result
