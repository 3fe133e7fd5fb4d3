"""CUDA graphs: of every layer, forward and backward, and of NCCL's collectives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import shardgrad as sg
from shardgrad.bench.gpu_check.cases import calls
from shardgrad.bench.gpu_check.finding import Finding, Setting, one_of_eight, one_rank
from shardgrad.comm.collectives import AllGather, AllReduce, ReduceScatter
from shardgrad.comm.mesh import view

UNSUITED = ("dropout",)  # whose masks are drawn by the host: a graph repeats its one


def find(setting: Setting) -> Finding:
    """The step."""
    figures = {}
    for chunks in (None, 2):
        with one_of_eight(setting) as mesh:
            sg.set_overlap(mesh, chunks)
            for name, call in calls(mesh, 64, 64, torch.float64).items():
                if name not in UNSUITED:
                    figures[f"{name}, {chunks or 'no'} chunks"] = told(call, setting)
    with one_rank(setting) as mesh:
        axis = view(mesh).axes["tp"]
        x = torch.randn(32, 32, device=setting.device, dtype=torch.float64)
        for collective in (AllReduce(axis), AllGather(axis, 0, 32), ReduceScatter(axis, 0)):
            name = f"{type(collective).__name__} of {'NCCL' if setting.on_gpu else 'gloo'}"
            figures[name] = told(lambda one=collective: [one(x.clone())], setting)  # type: ignore[misc]
    failed = [name for name, text in figures.items() if text.startswith("no")]
    return Finding(
        figures,
        f"these cannot be captured: {', '.join(failed)}"
        if failed
        else "everything can be captured, and a replay gives what a call gives"
        if setting.on_gpu
        else "every layer was called; capture needs a GPU",
        ok=not failed,
    )


def told(call: Callable[[], list[Tensor]], setting: Setting) -> str:
    """Whether a graph of the call gives what the call gives. It reads the same tensors each time."""
    if not setting.on_gpu:
        call()
        return "called; capture needs a GPU"
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                expected = call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = call()
        for tensor in found:
            tensor.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    except (RuntimeError, AssertionError) as error:
        return f"no: {str(error).splitlines()[0][:100]}"
    return "captured, and replayed to the same result"
