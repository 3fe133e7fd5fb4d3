"""What runs when, as dX's reduction begins before dW's product: with NCCL's stream at high priority, and without.

One GPU has nobody to send to, so a collective of one rank stands in, which NCCL copies on its own stream, and beside it
a kernel of element-wise sums, which like NCCL's own takes multiprocessors. Neither waits for a link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.bench.gpu_check.finding import Finding, Setting
from shardgrad.comm.collectives import AllGather
from shardgrad.comm.mesh import view

WIDTH = 60


@dataclass(frozen=True, slots=True)
class Span:
    """Milliseconds since the first product began."""

    name: str
    start: float
    end: float


def find(setting: Setting) -> Finding:
    """The step. The products are dX's and dW's of `down` of Llama 70B on one rank of eight, 4096 tokens."""
    setting.require_gpu()
    figures: dict[str, Any] = {}
    pictures = []
    for high in (False, True):
        how = "high priority" if high else "usual priority"
        for name, spans in (("NCCL", _of_nccl(high)), ("sums", _of_sums(high))):
            pictures.append(f"{name}, {how}\n{draw(spans)}")
            product, comm = spans[1], spans[2]
            hidden = (min(comm.end, product.end) - comm.start) / max(comm.end - comm.start, 1e-9)
            figures[f"{name}, {how}: share of it under the product"] = max(0.0, hidden)
            figures[f"{name}, {how}: ms after the product"] = max(0.0, comm.end - product.end)
    figures["timeline"] = "\n".join(pictures)
    gain = figures["sums, usual priority: ms after the product"] - figures["sums, high priority: ms after the product"]
    return Finding(
        figures,
        f"high priority takes {gain:.3f} ms from what is left behind dW's product: "
        + ("set TORCH_NCCL_HIGH_PRIORITY=1" if gain > 0.02 else "it makes no difference here"),
    )


def _of_nccl(high: bool) -> list[Span]:
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = high
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, pg_options=options)  # type: ignore[attr-defined]
    try:
        axis = view(init_device_mesh("cuda", (1,), mesh_dim_names=("tp",))).axes["tp"]
        gather = AllGather(axis, 0, 4096)
        return _timed(lambda dx: gather.start(dx), lambda handle: gather.wait(handle))
    finally:
        dist.destroy_process_group()


def _of_sums(high: bool) -> list[Span]:
    stream = torch.cuda.Stream(priority=-1 if high else 0)

    def start(dx: torch.Tensor) -> torch.cuda.Event:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                dx = dx + dx
            done = torch.cuda.Event()
            done.record()
        return done

    return _timed(start, lambda done: torch.cuda.current_stream().wait_event(done))


def _timed(start: Callable[[torch.Tensor], Any], wait: Callable[[Any], object]) -> list[Span]:
    """dX's product, the start of its collective, dW's product, the wait: when each was done, of the last of some runs.

    The collective's end is seen by a stream of its own that waits for it alone.
    """
    n, d, m = 4096, 3584, 8192
    dy, w, x = (torch.randn(shape, device="cuda").bfloat16() for shape in ((n, m), (m, d), (n, d)))
    watcher = torch.cuda.Stream()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    for _ in range(5):
        torch.cuda.synchronize()
        events[0].record()
        dx = dy.mm(w)
        events[1].record()
        handle = start(dx)
        dy.t().mm(x)
        events[2].record()
        with torch.cuda.stream(watcher):
            wait(handle)
            events[3].record()
        torch.cuda.current_stream().wait_stream(watcher)
    torch.cuda.synchronize()
    at = [events[0].elapsed_time(event) for event in events]
    return [Span("dX's product", 0.0, at[1]), Span("dW's product", at[1], at[2]), Span("collective", at[1], at[3])]


def draw(spans: list[Span]) -> str:
    """A line each, to one scale."""
    end = max(span.end for span in spans)
    lines = []
    for span in spans:
        before, length = (round(WIDTH * value / end) for value in (span.start, span.end - span.start))
        lines.append(f"{span.name:<14}{' ' * before}{'█' * max(1, length)} {span.start:.3f} to {span.end:.3f} ms")
    return "\n".join(lines)
