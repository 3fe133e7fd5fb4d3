"""Adding up what the ranks sent, always in the tree over the ranks that `layout.tree` describes, each with one piece:
the same result on every rank and in every run.

Sixteen-bit floats of more than two ranks are added in fp32, from the left, and rounded once. (Of two ranks, torch's
addition does just that already.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm.shm.errors import ShmError

_Op = Any  # dist.ReduceOp.RedOpType, which torch's stubs do not describe

_KERNELS: dict[_Op, tuple[str, Callable[..., Tensor]]] = {
    dist.ReduceOp.SUM: ("sum", torch.add),
    dist.ReduceOp.AVG: ("average", torch.add),
    dist.ReduceOp.PRODUCT: ("product", torch.mul),
    dist.ReduceOp.MIN: ("minimum", torch.minimum),
    dist.ReduceOp.MAX: ("maximum", torch.maximum),
    dist.ReduceOp.BAND: ("bitwise and", torch.bitwise_and),
    dist.ReduceOp.BOR: ("bitwise or", torch.bitwise_or),
    dist.ReduceOp.BXOR: ("bitwise xor", torch.bitwise_xor),
}
_BITWISE = (torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor)
_ADDITIVE = (torch.add, torch.mul)
_HALVES = (torch.float16, torch.bfloat16)


class Reduction:
    """One way to reduce tensors of one dtype over so many ranks. Of one group, whose lock guards the scratch memory."""

    def __init__(self, op: _Op, dtype: torch.dtype, ranks: int) -> None:
        self.name, self._kernel = _KERNELS[op]
        self._divisor = ranks if op == dist.ReduceOp.AVG else 1
        self._wide = dtype in _HALVES and ranks > 2 and self._kernel in _ADDITIVE
        self._scratch = torch.empty(0, dtype=torch.float32 if self._wide else dtype)

    def into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        """out = parts[0] op parts[1] op …. `out` may be one of the parts."""
        if len(parts) == 2:
            total = self._kernel(parts[0], parts[1], out=out)
        elif self._wide:
            total = self._scratch_of(out, 1)[0].copy_(parts[0])
            for part in parts[1:]:
                self._kernel(total, part, out=total)
        else:
            total = self._tree(parts, self._scratch_of(out, (len(parts) - 1).bit_length()), out)
        if self._divisor > 1:
            total.div_(self._divisor)
        if total is not out:
            out.copy_(total)

    def _tree(self, parts: Sequence[Tensor], scratch: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The parts, reduced, in `out`, which is written last, or in the first of `scratch`; of one part, itself."""
        if len(parts) == 1:
            return parts[0]
        half = 1 << (len(parts) - 1).bit_length() - 1
        left, right = self._tree(parts[:half], scratch), self._tree(parts[half:], scratch[1:])
        return self._kernel(left, right, out=scratch[0] if out is None else out)

    def _scratch_of(self, out: Tensor, count: int) -> Sequence[Tensor]:
        """So many tensors like `out`, or wider."""
        size = out.numel() * count
        if self._scratch.numel() < size:
            with torch.inference_mode(False):  # or the next use, outside of it, could not change this in place
                self._scratch = torch.empty(size, dtype=self._scratch.dtype)
        return self._scratch[:size].view(count, *out.shape).unbind()


def reduction(op: _Op, dtype: torch.dtype, ranks: int) -> Reduction:
    """Raises ShmError where the operation has no meaning for the dtype."""
    if op not in _KERNELS:
        raise ShmError(
            f"the shm backend does not reduce by {op}: use one of {', '.join(n for n, _ in _KERNELS.values())}"
        )
    name, kernel = _KERNELS[op]
    real = dtype.is_floating_point or dtype.is_complex
    if op == dist.ReduceOp.AVG and not real:
        raise ShmError(f"the average of {dtype} is not a {dtype}: reduce by sum, and divide as you mean it")
    if kernel in _BITWISE and real:
        raise ShmError(f"{name} does not apply to {dtype}: it is for integers and bool")
    if dtype.is_complex and kernel not in _ADDITIVE:
        raise ShmError(f"complex numbers have no {name}")
    if dtype.itemsize == 1 and dtype.is_floating_point:
        raise ShmError(f"torch does not add {dtype}: reduce in another dtype (moving {dtype} works)")
    return Reduction(op, dtype, ranks)
