"""One GPU's share of a large model: its products at the local sizes, beside plain nn.Linear and the chip's own rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.bench.timing import Spread, in_turns, ratio

RANKS = 8


@dataclass(frozen=True, slots=True)
class Product:
    """A layer: its global in and out features, and which of them is sharded."""

    name: str
    inner: int
    outer: int
    column: bool


def llama_70b() -> list[Product]:
    """The products of a block of Llama 2 70B (Touvron et al. 2023, arXiv 2307.09288, with the numbers of its released
    configuration): d 8192, hidden 28672, 64 heads of 128 features, 8 of keys and values."""
    d, hidden, head, heads, kv_heads = 8192, 28672, 128, 64, 8
    return [
        Product("queries, keys, values", d, (heads + 2 * kv_heads) * head, True),
        Product("attention's output", heads * head, d, False),
        Product("gate or up", d, hidden, True),
        Product("down", hidden, d, False),
    ]


@dataclass(frozen=True, slots=True)
class Row:
    """Forward and backward of one rank's part of a product, in microseconds.

    to_plain: how many times as long as nn.Linear. of_rate: share of the rate at which the device multiplies large
    matrices. main_grad, unfused: with the weight's gradient summed in float32, in the product or after it.
    """

    name: str
    tokens: int
    plain: Spread
    time: Spread
    to_plain: Spread
    of_rate: Spread
    main_grad: Spread
    unfused: Spread


def measure(
    products: Sequence[Product], tokens: int, mesh: DeviceMesh, dtype: torch.dtype, rounds: int, largest: int = 8192
) -> tuple[float, list[Row]]:
    """Measure this rank of axis `tp`: FLOP/s of a square product of `largest`, and the rows.

    On the `fake` backend that is one rank of as many as the mesh has: what it computes, and its own work for
    collectives that send nothing.
    """
    device = torch.device(mesh.device_type)
    a, b = (torch.randn(largest, largest, device=device).to(dtype) for _ in range(2))
    clock = synchronized(device)
    (squares,) = in_turns({"mm": lambda: torch.mm(a, b)}, rounds, clocks=(clock,))["mm"]
    rate = 2 * largest**3 / Spread.of(squares).median
    rows = []
    for product in products:
        steps = steps_of(product, tokens, mesh, dtype, device)
        times = {name: found[0] for name, found in in_turns(steps, rounds, clocks=(clock,), warm_up=5).items()}
        flops = 6 * tokens * product.inner * product.outer / mesh.size()
        spreads = {name: Spread.of(values).scaled(1e6) for name, values in times.items()}
        rows.append(
            Row(
                product.name,
                tokens,
                spreads["plain"],
                spreads["shardgrad"],
                ratio(times["shardgrad"], times["plain"]),
                Spread.of([flops / seconds / rate for seconds in times["shardgrad"]]),
                spreads["main_grad"],
                spreads["unfused"],
            )
        )
    return rate, rows


def synchronized(device: torch.device) -> Callable[[], float]:
    """The host's clock, once the device has done all."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def steps_of(
    product: Product, tokens: int, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], None]]:
    """Forward and backward of plain nn.Linear of the local sizes, of shardgrad's layer, and with main_grad, in the
    product and after it."""
    ranks = mesh.size()
    inner, outer = product.inner, product.outer
    inner, outer = (inner, outer // ranks) if product.column else (inner // ranks, outer)
    x = torch.randn(tokens, inner, device=device).to(dtype).requires_grad_()
    dy = torch.randn(tokens, outer, device=device).to(dtype)
    kind = sg.ColumnParallelLinear if product.column else sg.RowParallelLinear

    def layer() -> nn.Module:
        return kind(product.inner, product.outer, bias=False, mesh=mesh, dtype=dtype)

    plain = nn.Linear(inner, outer, bias=False, device=device, dtype=dtype)
    ours, fused, unfused = layer(), layer(), layer()
    sg.use_main_grads(fused.parameters())
    for parameter in unfused.parameters():
        parameter.register_post_accumulate_grad_hook(_adder(torch.zeros_like(parameter, dtype=torch.float32)))

    def step(module: nn.Module) -> Callable[[], None]:
        def call() -> None:
            x.grad = None
            for parameter in module.parameters():
                parameter.grad = None
            module(x).backward(dy)

        return call

    return {"plain": step(plain), "shardgrad": step(ours), "main_grad": step(fused), "unfused": step(unfused)}


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    """Adds a gradient that autograd has made to a float32 sum, and lets go of it."""

    def add(parameter: Tensor) -> None:
        total.add_(parameter.grad)  # type: ignore[arg-type]
        parameter.grad = None

    return add


def as_json(rate: float, rows: Sequence[Row]) -> dict[str, object]:
    return {"unit": "µs", "FLOP/s": rate, "rows": [asdict(row) for row in rows]}
