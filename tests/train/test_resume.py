"""A run that ended and goes on is the run that did not end: the same bits on the same mesh, the same data on any."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launched
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from shardgrad import files
from shardgrad.checkpoint import saving
from shardgrad.testing import distributed
from shardgrad.train import data, folder
from shardgrad.train.config import Config, Data, Model, Run, Sample, Train, check_ranks
from shardgrad.train.history import History
from shardgrad.train.loop import held_out_loss
from shardgrad.train.metrics import read
from shardgrad.train.page import write_page
from shardgrad.train.report import Report
from shardgrad.train.resume import Keeper
from shardgrad.train.signals import Stop

TEXT = "".join(f"line {i} of {i * i % 97}: {'abcdefgh'[i % 8 :]}\n" for i in range(120))
STEPS = 7


def configured(where: Path, **changed: Any) -> Config:
    """Odd sizes; what is measured, evaluated and saved falls on different steps."""
    own = where / f"text.{os.getpid()}"
    own.write_text(TEXT)
    own.replace(where / "text.txt")  # at once: another rank may be reading it
    sections: dict[str, Any] = {
        "run": Run(dir=str(where / "run"), resume="auto", seed=3),
        "model": Model(layers=1, heads=3, d_model=12, seq_len=5),
        "data": Data(files=[str(where / "text.txt")], held_out=0.2),
        "train": Train(
            steps=STEPS, batch=4, lr=0.01, warmup=1, log_every=3, eval_every=4, save_every=2, eval_batches=3
        ),
        "sample": Sample(prompt="li", tokens=3),
    }
    return Config(**{**sections, **changed})


def go(config: Config, tp: int, page: bool = False) -> None:
    """What the launcher does on every rank, but for the page; the mesh's other axis holds replicas."""
    ranks = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // tp, tp), mesh_dim_names=("replicas", "tp"))
    launched(mesh, check_ranks(config, tp), page=page)


def own(tmp_path: Path, name: str) -> Path:
    """A folder in the one that all ranks share."""
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    torch.distributed.barrier()
    return path


def losses(run: Path) -> list[tuple[str, int, float]]:
    return [(line["kind"], line["step"], line["loss"]) for line in read(run / "metrics.jsonl") if "loss" in line]


def same_bits(one: Path, other: Path) -> None:
    assert one.name == other.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    for key in ("step", "random", "text"):
        assert states[0][key] == states[1][key], key
    assert states[0]["history"]["held_out"] == states[1]["history"]["held_out"]
    assert states[0]["history"]["since"]["loss"] == states[1]["history"]["since"]["loss"]


def kill_once(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """This rank gets a signal while it does a step."""
    after = Keeper.after_step

    def killed(keeper: Keeper, history: History) -> bool:
        if history.step == step:
            os.kill(os.getpid(), number)
        return after(keeper, history)

    monkeypatch.setattr(Keeper, "after_step", killed)


@distributed(world_size=[1, 2, 3], timeout=120, backend="shm")
@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_and_going_on(
    world_size: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """Each of the two signals on some number of ranks in turn 0, the other in turn 1."""
    number = (signal.SIGTERM, signal.SIGINT)[(world_size + turn) % 2]
    whole, parted = own(tmp_path, "whole"), own(tmp_path, "parted")
    go(configured(whole), world_size)
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patched:
        if rank == world_size - 1:
            kill_once(patched, 4, number)
        go(configured(parted), world_size)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    # All ended after the step that follows the signal, one that is neither measured, evaluated nor due to be saved.
    assert [step for step, _ in folder.checkpoints(parted / "run")] == [4, 5]
    (stopped,) = [line for line in read(parted / "run" / "metrics.jsonl") if line["kind"] == "stopped"]
    assert (stopped["step"], stopped["signal"]) == (5, number.name)
    assert not (parted / "run" / "sample.txt").exists()
    torch.distributed.barrier()
    torch.rand(5)  # a process that begins has another random state
    go(configured(parted), world_size)
    for step in (6, 7):
        same_bits(folder.checkpoint(whole / "run", step), folder.checkpoint(parted / "run", step))
    assert losses(parted / "run") == losses(whole / "run")
    assert [line[:2] for line in losses(parted / "run")] == [
        *(("train", 1), ("train", 3), ("held_out", 4), ("train", 6), ("train", 7), ("held_out", 7)),
    ]
    assert (parted / "run" / "sample.txt").read_text() == (whole / "run" / "sample.txt").read_text()
    assert [line["step"] for line in read(parted / "run" / "metrics.jsonl") if line["kind"] == "start"] == [0, 5]


@distributed(world_size=[2], timeout=120, backend="shm")
def test_a_crash_goes_on_from_the_last_checkpoint(
    world_size: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it, metrics were written that will be written again."""
    whole, parted = own(tmp_path, "whole"), own(tmp_path, "parted")
    config = configured(parted, data=Data(files=[str(parted / "text.txt")], tokenizer="bpe", vocab=270))
    go(configured(whole, data=Data(files=[str(whole / "text.txt")], tokenizer="bpe", vocab=270)), world_size)
    with monkeypatch.context() as patched:
        after = Keeper.after_step

        def crash(keeper: Keeper, history: History) -> bool:
            if history.step == 3:
                raise RuntimeError("the machine burns")
            return after(keeper, history)

        patched.setattr(Keeper, "after_step", crash)
        with pytest.raises(RuntimeError, match="burns"):
            go(config, world_size)
    torch.distributed.barrier()
    assert losses(parted / "run")[-1][:2] == ("train", 3)
    torch.distributed.barrier()
    monkeypatch.setattr("shardgrad.train.tokenizer.train", None)  # the vocabulary is found, not made again
    go(config, world_size)
    same_bits(folder.checkpoint(whole / "run", STEPS), folder.checkpoint(parted / "run", STEPS))
    assert losses(parted / "run") == losses(whole / "run")
    sample = (parted / "run" / "sample.txt").read_text()
    assert sample.startswith("li")
    # Finished: the same command trains no more, and makes the same page and sample.
    before = folder.checkpoint(parted / "run", STEPS).stat().st_mtime_ns
    go(config, world_size)
    assert folder.checkpoint(parted / "run", STEPS).stat().st_mtime_ns == before
    assert (parted / "run" / "sample.txt").read_text() == sample
    assert losses(parted / "run") == losses(whole / "run")
    # Its last checkpoint is damaged: it goes on from the one before, saves that step again, and keeps what there was.
    torch.distributed.barrier()
    flipped = folder.checkpoint(parted / "run", STEPS) / "optimizer.safetensors"
    if rank == 0:
        raw = flipped.read_bytes()
        flipped.write_bytes(raw[:-1] + bytes([raw[-1] ^ 64]))
    torch.distributed.barrier()
    told: list[str] = []
    monkeypatch.setattr(Report, "say", lambda _, text: told.append(text))
    go(config, world_size)
    same_bits(folder.checkpoint(whole / "run", STEPS), folder.checkpoint(parted / "run", STEPS))
    aside = flipped.parent.with_name("step-00000007.damaged") / flipped.name
    assert aside.read_bytes()[:-1] == raw[:-1] if rank == 0 else aside.exists()
    assert any(line.startswith("going on after step 6") for line in told)
    about = [line for line in told if "a damaged checkpoint was passed over" in line]
    assert [line.endswith("(kept as step-00000007.damaged; nothing was deleted)") for line in about] == [True] * (
        not rank
    )


@pytest.mark.slow
@distributed(world_size=[4], timeout=120, backend="shm")
def test_on_other_meshes(world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ranks, then 1, then 4: the same batches, and the curve of 2 ranks within rounding."""
    whole, parted = own(tmp_path, "whole"), own(tmp_path, "parted")
    go(configured(whole), 2)
    seen: list[tuple[int, Any]] = []
    draw = data.batch
    monkeypatch.setattr(data, "batch", lambda *given: seen.append((given[2], draw(*given))) or seen[-1][1])
    agreed = Stop.agreed
    for ranks, until in ((2, 2), (1, 5), (4, STEPS + 1)):
        monkeypatch.setattr(Stop, "agreed", lambda _, step, until=until: "SIGTERM" if step == until else None)
        go(configured(parted), ranks)
    assert agreed is not Stop.agreed
    assert [step for step, _ in seen] == [*(0, 0, 1), *(2, 2, 3, 4), *(5, 5, 6)]  # each mesh's first step is checked
    text = data.part(TEXT.encode(), 0.2, 5)
    for step, (ids, targets) in seen:
        want = draw(text, 3, step, 4, 5)
        assert torch.equal(ids, want[0])
        assert torch.equal(targets, want[1])
    assert [line[:2] for line in losses(parted / "run")] == [line[:2] for line in losses(whole / "run")]
    for (_, _, loss), (_, _, want) in zip(losses(parted / "run"), losses(whole / "run"), strict=True):
        assert loss == pytest.approx(want, rel=1e-5)
    starts = [line for line in read(parted / "run" / "metrics.jsonl") if line["kind"] == "start"]
    assert [line["mesh"]["tp"] for line in starts] == [2, 1, 4]
    ends = [load_file(folder.checkpoint(path / "run", STEPS) / "model.safetensors") for path in (parted, whole)]
    for name, tensor in ends[0].items():
        if not name.endswith("key_bias"):  # its gradient is all rounding, whose direction Adam follows
            torch.testing.assert_close(tensor, ends[1][name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@distributed(world_size=[2], timeout=120, backend="shm")
def test_a_new_run_from_another_s_checkpoint(world_size: int, tmp_path: Path) -> None:
    first = own(tmp_path, "first")
    data = Data(files=[str(first / "text.txt")], tokenizer="bpe", vocab=270)
    go(configured(first, data=data), world_size)
    start = folder.checkpoint(first / "run", 6)
    branch = configured(first, data=data, run=Run(dir=str(first / "run"), resume=str(start), seed=3))
    go(branch, world_size)
    same_bits(folder.checkpoint(first / "run", STEPS), folder.checkpoint(first / "run-2", STEPS))
    assert (first / "run-2" / "tokenizer.json").read_bytes() == (first / "run" / "tokenizer.json").read_bytes()


@distributed(world_size=[2], timeout=120, backend="shm")
def test_a_full_disk_keeps_the_checkpoint_before(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = own(tmp_path, "full")
    write = saving._write

    def full(path: Path, *rest: Any) -> None:
        if path.name == "step-00000004":
            monkeypatch.setattr(files, "to_disk", out_of_space)
        write(path, *rest)

    def out_of_space(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(saving, "_write", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*step-00000004: .*No space left on device"):
        go(configured(where), world_size)
    torch.distributed.barrier()
    assert [path.name for path in (where / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    go(configured(where), world_size)
    assert [step for step, _ in folder.checkpoints(where / "run")] == [6, 7]


@distributed(world_size=[1], backend="shm")
def test_the_page_needs_nothing_else(world_size: int, tmp_path: Path) -> None:
    config = configured(tmp_path, sample=Sample(prompt="<b>&", tokens=2))
    go(config, world_size, page=True)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3  # one rank sends nothing
    assert "http:" not in page
    assert "https:" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    for told in (f"<b>{STEPS}</b><span>steps</span>", "agree with one device", "seq_len</td><td>5", torch.__version__):
        assert told in page, told
    held_out = read(tmp_path / "run" / "metrics.jsonl")[-1]["held_out"]
    assert f"<b>{held_out:.3f}</b><span>held-out loss, nats a byte</span>" in page
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "bytes", "step": 0, "by_operation": [["all-reduce", "tp", 3, 5000000]], ')
        file.write('"by_rank": [{"predicted": 5000000, "traced": 5000000}]}\n')
    write_page(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "sends 5,000,000 bytes a step, as predicted" in page


@distributed(world_size=[2], backend="shm")
def test_evaluation_is_a_mean_over_batches(world_size: int) -> None:
    from tiny import gpt

    model, _ = gpt(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)))
    text = data.part(bytes(i * i % 7 for i in range(200)), 0.5, 6)
    parts = [float(model.loss(ids, targets).detach()) for ids, targets in data.held_out(text, 3, 6)]
    assert len(parts) == 6  # of 16 sequences
    assert held_out_loss(model, text, 3, 2) == pytest.approx(sum(parts[:2]) / 2, rel=1e-12)
    assert held_out_loss(model, text, 3) == pytest.approx((3 * sum(parts[:5]) + parts[5]) / 16, rel=1e-12)
    assert held_out_loss(model, text, 3, 99) == held_out_loss(model, text, 3)
