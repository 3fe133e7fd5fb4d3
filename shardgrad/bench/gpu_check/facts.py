"""What the backend does, by calling it: with tensors that are not contiguous, and with `asyncOp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from shardgrad.bench.gpu_check.finding import Finding, Setting, one_rank
from shardgrad.comm import fused, shim
from shardgrad.comm.mesh import Axis, view


def find(setting: Setting) -> Finding:
    """The step: shardgrad hands contiguous tensors to NCCL, and awaits what `asyncOp = True` returns."""
    device = setting.device
    figures: dict[str, Any] = {}
    with one_rank(setting) as mesh:
        axis = view(mesh).axes["tp"]
        square = torch.randn(64, 64, device=device)
        for name, call in _calls(axis).items():
            for kind, x in (("contiguous", square.clone()), ("transposed", square.clone().t())):
                for blocking in (False, True):
                    figures[f"{name}, {kind}, asyncOp={not blocking}"] = _told(call, x, not blocking)
        if setting.on_gpu:
            figures["symmetric memory on one rank"] = _fused(axis, device)
    refused = [name for name, told in figures.items() if "transposed" in name and told.startswith("refused")]
    wrong = [name for name, told in figures.items() if "wrong" in told]
    return Finding(
        figures,
        f"{len(refused)} of 6 calls with a transposed tensor are refused (shardgrad makes all contiguous before); "
        + (f"wrong results: {', '.join(wrong)}" if wrong else "all others leave the right result after wait()"),
        ok=not any("contiguous, " in name and figures[name].startswith("refused") for name in figures) and not wrong,
    )


def _calls(axis: Axis) -> dict[str, Callable[[torch.Tensor, bool], tuple[Any, torch.Tensor]]]:
    """Each returns the work, and what over one rank must become equal to the input."""

    def all_reduce(x: torch.Tensor, is_async: bool) -> tuple[Any, torch.Tensor]:
        options = dist.AllreduceOptions()
        options.asyncOp = is_async
        return axis.backend.allreduce([x], options), x

    def all_gather(x: torch.Tensor, is_async: bool) -> tuple[Any, torch.Tensor]:
        options = shim.AllgatherOptions()
        options.asyncOp = is_async
        out = torch.empty(x.shape, device=x.device)
        return shim.all_gather_of(axis.backend)(out, x, options), out

    def reduce_scatter(x: torch.Tensor, is_async: bool) -> tuple[Any, torch.Tensor]:
        options = dist.ReduceScatterOptions()
        options.asyncOp = is_async
        out = torch.empty(x.shape, device=x.device)
        return shim.reduce_scatter_of(axis.backend)(out, x, options), out

    return {"all-reduce": all_reduce, "all-gather": all_gather, "reduce-scatter": reduce_scatter}


def _told(call: Callable[[torch.Tensor, bool], tuple[Any, torch.Tensor]], x: torch.Tensor, is_async: bool) -> str:
    expected = x.clone()
    try:
        work, out = call(x, is_async)
        if work is not None:
            work.wait()
    except (RuntimeError, ValueError) as error:
        return f"refused: {str(error).splitlines()[0][:80]}"
    right = torch.equal(out, expected)
    return f"{'no work' if work is None else 'a work'}, {'right' if right else 'wrong'} result"


def _fused(axis: Axis, device: torch.device) -> str:
    """Whether torch's products over symmetric memory run here, over one rank."""
    why = shim.lacks_fused_products(device)
    if why:
        return f"no: {why}"
    try:
        shim.begin_symmetric_memory(axis.group)
        left, right = torch.randn(64, 32, device=device), torch.randn(32, 16, device=device)
        _, (gathered,) = fused.FusedGatherMatmul(axis, 0, "gather", returns_whole=False).multiply(left, [right])
        reduced = fused.FusedMatmulReduceScatter(axis, 0, "reduce").multiply(left, right)
        expected = left @ right
        torch.testing.assert_close(gathered, expected)
        torch.testing.assert_close(reduced, expected)
    except (RuntimeError, AssertionError) as error:
        return f"no: {str(error).splitlines()[0][:80]}"
    return "both products run, and are right"
