"""The questions for a GPU, asked in small on a CPU: each is answered, or says that it needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.bench.gpu_check import capture, cases, run, timeline
from shardgrad.bench.gpu_check.correctness import check
from shardgrad.bench.gpu_check.finding import Finding, NeedsGpuError, Setting, Step
from shardgrad.bench.gpu_check.steps import STEPS
from shardgrad.testing import distributed

ROOT = Path(__file__).parents[2]
DRY = Setting(torch.device("cpu"), dry=True)
NEED = {"addmm", "timeline"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [step for step in STEPS if step.name != "correctness"], ids=lambda step: step.name)
def test_every_question_is_answered_on_a_cpu(step: Step) -> None:
    outcome = run.find(step, DRY)
    assert not dist.is_initialized()
    if step.name in NEED:
        assert outcome == {"status": "needs a GPU"}
        return
    assert outcome["status"] == "ran on a CPU", outcome
    assert outcome["figures"]
    json.dumps(outcome)
    text = run.told(3, step, {**outcome, "seconds": 1.5})
    assert text.startswith(f"3. {step.question}")
    assert all(name in text for name in outcome["figures"])
    assert f"ran on a CPU: {outcome['conclusion']}" in text


@distributed(world_size=[2, 3])
def test_layers_are_compared_with_one_device(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for sequence_dim in (None, 0):
        assert 0 <= check(mesh, sequence_dim) <= 1e-11
    monkeypatch.setattr("shardgrad.comm.collectives.AllReduce.wait", lambda self, handle: handle[1] * torch.nan)
    monkeypatch.setattr("shardgrad.comm.collectives.AllReduce.__call__", lambda self, x: x * torch.nan)
    with pytest.raises(AssertionError, match="nan is more than rounding"):
        check(mesh, None)


def test_steps_that_fail_or_hang_stop_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(step: Step, arguments: list[str], limit: float) -> run.Outcome:
        assert limit <= step.limit
        return run.find(step, DRY) if step.name != "slow" else {"status": "too slow", "error": "not done after 60 s"}

    def needs(setting: Setting) -> Finding:
        setting.require_gpu()
        raise AssertionError

    def fails(setting: Setting) -> Finding:
        raise RuntimeError("this is what was raised")

    monkeypatch.setattr(run, "apart", outcome)
    steps = [
        Step("needs", "Needs?", needs),
        Step("fails", "Fails?", fails),
        Step("slow", "Slow?", fails),
        Step("odd", "Odd?", lambda _: Finding({"figure": 0.25}, "odd", ok=False)),
        Step("well", "Well?", lambda _: Finding({"figure": 0.5}, "all is well")),
    ]
    out = tmp_path / "found.json"
    assert run.run(steps, DRY, [], out, 600) == 3
    found = json.loads(out.read_text())
    statuses = [found["steps"][step.name]["status"] for step in steps]
    assert statuses == ["needs a GPU", "failed", "too slow", "not as assumed", "ran on a CPU"]
    on_gpu = Setting(torch.device("cuda"), dry=True)
    assert [run.find(step, on_gpu)["status"] for step in steps[-2:]] == ["not as assumed", "as assumed"]
    assert found["steps"]["well"]["figures"] == {"figure": 0.5}
    assert found["machine"]["torch"] == torch.__version__
    text = capsys.readouterr().out
    assert "this is what was raised" in text
    assert "→ ran on a CPU: all is well" in text
    assert "5 steps in 0 s: needs a GPU: 1, failed: 1, too slow: 1, not as assumed: 1, ran on a CPU: 1; " in text
    assert run.run(steps[-1:], DRY, [], out, 0) == 1  # no time is left


@pytest.mark.slow
def test_a_step_apart_comes_back_and_one_that_hangs_is_ended() -> None:
    step = next(step for step in STEPS if step.name == "addmm")
    if not torch.cuda.is_available():
        assert run.apart(step, ["--dry"], 120) == {"status": "needs a GPU"}
    assert run.apart(step, ["--dry"], 0.2)["status"] == "too slow"
    assert run.apart(step, ["--no-such-option"], 60)["status"] == "failed"


def test_a_capture_that_gives_something_else_is_told() -> None:
    assert capture.told(lambda: [], DRY) == "called; capture needs a GPU"
    with pytest.raises(NeedsGpuError, match="needs a GPU"):
        timeline.find(DRY)
    assert set(capture.UNSUITED) == {"dropout"}
    assert callable(cases.calls)


def test_the_timeline_is_drawn_to_scale() -> None:
    spans = [timeline.Span("a", 0, 1), timeline.Span("b", 1, 4), timeline.Span("c", 1, 2)]
    lines = timeline.draw(spans).split("\n")
    bars = [(line[14:].count("█"), len(line[14:]) - len(line[14:].lstrip())) for line in lines]
    assert bars == [(15, 0), (45, 15), (15, 15)]


@pytest.mark.slow
@pytest.mark.rare
def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    script = ROOT / "launch" / "gpu_check.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    refused = subprocess.run(
        ["bash", script], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    if not torch.cuda.is_available():
        assert refused.returncode == 2
        assert "sees no CUDA device" in refused.stderr
    done = subprocess.run(
        ["bash", script, "--dry"], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    found = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert list(found) == [step.name for step in STEPS]
    late = {name for name, one in found.items() if one["status"] == "too slow"}  # on a machine that others use
    assert {name: one for name, one in found.items() if one["status"] in ("failed", "not as assumed")} == {}
    assert done.returncode == bool(late), done.stderr
