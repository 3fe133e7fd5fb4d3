"""Products of 16-bit matrices that leave the multiplier in float32, and weights' gradients summed in float32."""

from __future__ import annotations

import torch

import shardgrad as sg
from shardgrad.bench.gpu import llama_70b, steps_of, synchronized
from shardgrad.bench.gpu_check.finding import Finding, Setting, one_of_eight, one_rank
from shardgrad.bench.timing import Spread, in_turns, ratio


def addmm(setting: Setting) -> Finding:
    """The step: what `Contraction.add_to` relies on."""
    setting.require_gpu()
    torch.manual_seed(3)
    a, b = (torch.randn(256, 4096, device="cuda").bfloat16() for _ in range(2))
    main = torch.randn(256, 256, device="cuda")
    exact = main.double() + a.double() @ b.double().t()
    rounded = float((main + a @ b.t() - exact).abs().max())
    try:
        torch.addmm(main, a, b.t(), out_dtype=torch.float32, out=main)
    except (RuntimeError, TypeError) as refused:
        said = str(refused).splitlines()[0][:100]
        return Finding(
            {"addmm": f"refused: {said}"}, "main_grad cannot use it: add a rounded product instead", ok=False
        )
    error = float((main - exact).abs().max())
    return Finding(
        {"largest error": error, "largest error of a product rounded to bfloat16": rounded},
        "the sum is float32's" if error < rounded / 10 else "the product is rounded on the way: no gain",
        ok=error < rounded / 10,
    )


def main_grad(setting: Setting) -> Finding:
    """The step: the error of eight micro-batches, and what it costs."""
    figures: dict[str, object] = {}
    n, d, m = (64, 32, 24) if setting.dry else (512, 256, 192)
    with one_rank(setting) as mesh:
        torch.manual_seed(2)
        layers = [sg.ColumnParallelLinear(d, m, bias=False, mesh=mesh, dtype=torch.bfloat16) for _ in range(2)]
        layers[1].load_state_dict(layers[0].state_dict())
        (main,) = sg.use_main_grads(layers[0].parameters())
        rounded, exact = torch.zeros_like(main), torch.zeros_like(main, dtype=torch.float64)
        for _ in range(8):
            x, dy = (torch.randn(n, size, device=setting.device).bfloat16() for size in (d, m))
            exact += dy.double().t() @ x.double()
            layers[0](x).backward(dy)
            layers[1](x).backward(dy)
            grad = layers[1].weight.grad
            assert grad is not None
            rounded += grad
            layers[1].weight.grad = None
        errors = [float((total.double() - exact).norm() / exact.norm()) for total in (main, rounded)]
        figures["relative error, main_grad"], figures["relative error, rounded to bfloat16 first"] = errors
    with one_of_eight(setting) as mesh:
        product = llama_70b()[2]
        if setting.dry:
            product = type(product)("small", 64, 64, True)
        steps = steps_of(product, 64 if setting.dry else 4096, mesh, torch.bfloat16, setting.device)
        clock = synchronized(setting.device)
        times = {name: found[0] for name, found in in_turns(steps, 5 if setting.dry else 11, clocks=(clock,)).items()}
        for name in ("main_grad", "unfused"):
            figures[f"µs, {product.name}, {name}"] = Spread.of(times[name]).scaled(1e6).median
            figures[f"times as long as without, {name}"] = ratio(times[name], times["shardgrad"]).median
    near = errors[0] < errors[1] / 10
    return Finding(
        figures,
        ("gradients leave the multiplier in float32" if near else "gradients are rounded before they are added")
        + ("" if setting.on_gpu else ", as they must be on CPUs"),
        ok=near or not setting.on_gpu,
    )
