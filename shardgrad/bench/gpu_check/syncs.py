"""Whether a warm step of any layer has the host wait for the device."""

from __future__ import annotations

import torch

from shardgrad.bench.gpu_check.cases import calls
from shardgrad.bench.gpu_check.finding import Finding, Setting, one_of_eight


def find(setting: Setting) -> Finding:
    """The step."""
    figures = {}
    with one_of_eight(setting) as mesh:
        for name, call in calls(mesh, 64, 64).items():
            for _ in range(3):
                call()
            figures[name] = _told(call) if setting.on_gpu else "called; sync-debug needs a GPU"
    waiting = [name for name, told in figures.items() if told.startswith("waits")]
    return Finding(
        figures,
        f"these wait for the device, and the host cannot run ahead: {', '.join(waiting)}"
        if waiting
        else "no layer waits for the device"
        if setting.on_gpu
        else "every layer was called; whether one waits for the device needs a GPU",
        ok=not waiting,
    )


def _told(call: object) -> str:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()  # type: ignore[operator]
    except RuntimeError as error:
        return f"waits: {str(error).splitlines()[0][:100]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "does not wait"
