"""A step in float64 throughout, also where the program computes in float32 (a softmax, a norm)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from shardgrad.comm import shim
from shardgrad.models.flow import tensors_in

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class InFloat64(shim.TorchDispatchMode):
    """Inside the block, what is asked for in a narrower floating dtype is made in float64.

    keep: dtypes that are left as they are: a cast that one device does not make is a mistake to be seen.
    asked: the dtypes that the program has cast to.
    """

    def __init__(self, keep: Collection[torch.dtype] = ()) -> None:
        super().__init__()
        self.keep = keep
        self.asked: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        if dtype in NARROW:
            self.asked.add(dtype)
            if dtype not in self.keep:
                kwargs["dtype"] = torch.float64
        grouped = func is shim.GROUPED_MM and args[0].dtype == torch.float64
        result = grouped_mm(*args, **kwargs) if grouped else func(*args, **kwargs)
        made = isinstance(result, Tensor) and result.dtype in NARROW and result.dtype not in self.keep
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


def why_not(model: nn.Module) -> str:
    """Why a model's parameters cannot be given float64 values for a step; empty if they can."""
    for name, module in model.named_modules():
        if isinstance(module, DDP | FSDP | FSDPModule):
            return f"{name or type(module).__name__} keeps buffers in the dtype that it was made with"
    for name, parameter in model.named_parameters():
        if getattr(parameter, "main_grad", None) is not None:
            return f"{name}'s gradient is summed in a buffer of its own (main_grad)"
    return ""


@contextmanager
def floating_in_float64(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers of a floating dtype are float64 inside the block, and what they were after it."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in NARROW]
    before = [t.detach() if isinstance(t, DTensor) else t.data for t in tensors]
    try:
        for tensor, value in zip(tensors, before):
            shim.set_data(tensor, _double(value))
        yield
    finally:
        for tensor, value in zip(tensors, before):
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
            shim.set_data(tensor, value)


def _double(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.double()
    return DTensor.from_local(
        tensor.to_local().double(), tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape,
        stride=tensor.stride(),
    )  # fmt: skip
