"""The host's time for layers, Llama's products at their local sizes, and measured costs beside a large product."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import shardgrad as sg
from shardgrad.bench.gpu import Product, llama_70b, measure
from shardgrad.bench.gpu_check.finding import Finding, Setting, one_of_eight, one_rank
from shardgrad.ops.measured_costs import by_events


def host_time(setting: Setting) -> Finding:
    """The step: forward and backward of tiny products, whose launches take longer than they do."""
    figures: dict[str, float] = {}
    d, m, tokens = 64, 256, 64
    with one_of_eight(setting) as mesh:
        ranks = mesh.size()
        plain = nn.Linear(d, m // ranks, bias=False, device=setting.device)
        figures["nn.Linear"] = _host(plain, (tokens, d), m // ranks, setting)
        for chunks in (None, 2, 4):
            sg.set_overlap(mesh, chunks)
            name = f", {chunks} chunks" if chunks else ""
            column = sg.ColumnParallelLinear(d, m, bias=False, mesh=mesh)
            sequence = sg.ColumnParallelLinear(d, m, bias=False, mesh=mesh, sequence_dim=0)
            row = sg.RowParallelLinear(m, d, bias=False, mesh=mesh, sequence_dim=0)
            figures[f"column{name}"] = _host(column, (tokens, d), m // ranks, setting)
            figures[f"column + sequence{name}"] = _host(
                lambda x, layer=sequence: layer(x, tokens),
                (tokens // ranks, d),
                m // ranks,
                setting,
            )
            figures[f"row + sequence{name}"] = _host(row, (tokens, m // ranks), d, setting)
    times = figures["column"] / figures["nn.Linear"]
    pieces = figures["column + sequence, 4 chunks"]
    return Finding(
        {f"µs of the host, {name}": value for name, value in figures.items()},
        f"a column parallel layer costs the host {times:.2f} times nn.Linear's; in 4 chunks with sequence parallelism "
        f"{pieces:.0f} µs: chunks pay where a product takes the device longer than that",
    )


def _host(layer: Callable[..., torch.Tensor], shape: tuple[int, int], out: int, setting: Setting) -> float:
    """Microseconds until forward and backward have been launched: the least of several means of some calls."""
    x = torch.randn(shape, device=setting.device, requires_grad=True)
    dy = torch.randn_like(layer(x))
    assert dy.shape[-1] == out

    def step() -> None:
        x.grad = None
        layer(x).backward(dy)

    calls, found = 20, []
    for _ in range(3 if setting.dry else 15):
        if setting.on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        found.append(1e6 * (time.perf_counter() - start) / calls)
    return min(found)


def llama(setting: Setting) -> Finding:
    """The step: one rank of eight, in bfloat16."""
    products = [Product("small", 64, 64, True), Product("other", 64, 64, False)] if setting.dry else llama_70b()
    tokens, rounds, largest = (32, 3, 64) if setting.dry else (4096, 11, 8192)
    with one_of_eight(setting) as mesh:
        rate, rows = measure(products, tokens, mesh, torch.bfloat16, rounds, largest)
    figures: dict[str, float] = {f"TFLOP/s of {largest}³": rate / 1e12}
    for row in rows:
        figures[f"{row.name}, times as long as nn.Linear"] = row.to_plain.median
        figures[f"{row.name}, share of the chip's rate"] = row.of_rate.median
    worst, least = max(row.to_plain.median for row in rows), min(row.of_rate.median for row in rows)
    return Finding(
        figures,
        f"at most {worst:.3f} times nn.Linear's time, at least {least:.0%} of the chip's rate on a large product "
        "(communication not counted: none is sent)",
        ok=setting.dry or worst < 1.05,
    )


def costs(setting: Setting) -> Finding:
    """The step: are the sizes that `measure_costs` multiplies large enough to show the chip's rate?"""
    dtypes = (torch.float32, torch.bfloat16)
    size = 256 if setting.dry else 8192
    figures: dict[str, float] = {}
    shares = {}
    with one_rank(setting) as mesh:
        begun = time.perf_counter()
        found = sg.measure_costs(mesh, dtypes)
        figures["s that measure_costs took"] = time.perf_counter() - begun
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))
        seconds = _large(lambda a=a, b=b: torch.mm(a, b), setting)  # type: ignore[misc]
        name = str(dtype).removeprefix("torch.")
        figures[f"TFLOP/s by measure_costs, {name}"] = 1e-12 / found.seconds_per_flop[dtype]
        figures[f"TFLOP/s of {size}³, {name}"] = 2e-12 * size**3 / seconds
        shares[name] = figures[f"TFLOP/s by measure_costs, {name}"] / figures[f"TFLOP/s of {size}³, {name}"]
    near = all(0.8 < share < 1.25 for share in shares.values())
    told = ", ".join(f"{share:.0%} in {name}" for name, share in shares.items())
    return Finding(
        figures,
        f"measure_costs finds {told} of the rate of a large product: "
        + ("what it decides by is the chip's rate" if near else "its sizes do not show the chip's rate"),
        ok=near or not setting.on_gpu,
    )


def _large(call: Callable[[], object], setting: Setting) -> float:
    if setting.on_gpu:
        return median(by_events(call, 5, 3))
    call()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
