"""Each step in a process of its own, with a limit; printed as it ends, and all of them as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shardgrad.bench.gpu_check.finding import Finding, NeedsGpuError, Setting, Step

Outcome = dict[str, Any]
"""status: "as assumed", "not as assumed", "needs a GPU", "failed", "too slow", or without a GPU, of which what ran then
says nothing, "ran on a CPU"; with figures and a conclusion, or the error."""

NO_GPU = "ran on a CPU"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the steps ran."""

    device: str
    torch: str
    cuda: str | None
    python: str

    @staticmethod
    def here(setting: Setting) -> Machine:
        name = torch.cuda.get_device_name() if setting.on_gpu else f"{platform.machine()} (no GPU)"
        return Machine(name, torch.__version__, torch.version.cuda, platform.python_version())


def find(step: Step, setting: Setting) -> Outcome:
    """Run a step here."""
    try:
        found: Finding = step.find(setting)
    except NeedsGpuError as needs:
        return {"status": str(needs)}
    except Exception:
        return {"status": "failed", "error": traceback.format_exc()}
    status = "not as assumed" if not found.ok else "as assumed" if setting.on_gpu else NO_GPU
    return {"status": status, "figures": found.figures, "conclusion": found.conclusion}


def apart(step: Step, arguments: list[str], limit: float) -> Outcome:
    """Run a step in a process of its own, which is ended when its time is over: one that hangs stops no other."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as found:
        command = [sys.executable, "-m", __package__, *arguments, "--step", step.name, "--out", found.name]
        try:
            done = subprocess.run(command, timeout=limit, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return {"status": "too slow", "error": f"not done after {limit:.0f} s"}
        text = found.read()
    if not text:
        return {"status": "failed", "error": f"exit status {done.returncode}\n{done.stderr[-2000:]}"}
    outcome: Outcome = json.loads(text)
    return outcome


def run(steps: list[Step], setting: Setting, arguments: list[str], out: Path, total: float) -> int:
    """All steps within `total` seconds. Returns how many failed, were too slow or are not as shardgrad assumes."""
    machine = Machine.here(setting)
    print(f"{machine.device}, torch {machine.torch}, CUDA {machine.cuda}, Python {machine.python}\n", flush=True)
    begun, outcomes = time.monotonic(), {}
    for number, step in enumerate(steps, 1):
        started = time.monotonic()
        left = total - (started - begun)
        outcome = (
            apart(step, arguments, min(step.limit, left)) if left > 1 else {"status": "too slow", "error": "no time"}
        )
        outcome = {**outcome, "seconds": round(time.monotonic() - started, 1)}
        outcomes[step.name] = {"question": step.question, **outcome}
        print(told(number, step, outcome), flush=True)
    out.write_text(json.dumps({"machine": asdict(machine), "steps": outcomes}, indent=1, ensure_ascii=False) + "\n")
    counts = [one["status"] for one in outcomes.values()]
    print(
        f"{len(steps)} steps in {time.monotonic() - begun:.0f} s: "
        + ", ".join(f"{status}: {counts.count(status)}" for status in dict.fromkeys(counts))
        + f"; {out}"
    )
    return sum(status not in ("as assumed", "needs a GPU", NO_GPU) for status in counts)


def told(number: int, step: Step, outcome: Outcome) -> str:
    """A step for a reader: its question, its figures, and what to conclude."""
    lines = [f"{number}. {step.question} ({step.name}, {outcome['seconds']} s)"]
    figures = outcome.get("figures", {})
    for name, value in figures.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines += (
            [f"   {name}:", *(f"      {line}" for line in text.split("\n"))] if "\n" in text else [f"   {name}: {text}"]
        )
    if "error" in outcome:
        lines += [f"   {line}" for line in outcome["error"].strip().split("\n")[-6:]]
    lines.append(f"   → {outcome['status']}" + (f": {outcome['conclusion']}" if "conclusion" in outcome else ""))
    return "\n".join(lines) + "\n"
