"""Losses that are read a step late: when the host waits, what it knows then, and a loss that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, nan

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.comm.timer import CommTimer
from shardgrad.testing import distributed
from shardgrad.train import data, late
from shardgrad.train.build import build
from shardgrad.train.config import Config, Model, Train
from shardgrad.train.history import History
from shardgrad.train.late import LateNumber, LateSteps, TrainingError
from shardgrad.train.loop import train
from shardgrad.train.metrics import Metrics
from shardgrad.train.optimizer import make_optimizer
from shardgrad.train.report import Report

SETTINGS = Train(steps=9, batch=3, lr=0.01, warmup=1, log_every=4, eval_every=8)
SIZES = Model(layers=1, heads=2, d_model=8, seq_len=5)
TEXT = data.part(bytes(i * i % 97 for i in range(400)), 0.2, 5)


class OnTheWay(LateNumber):
    """A number that is not there until it is read."""

    log: list[float] = []  # noqa: RUF012

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.there = False

    def read(self) -> float:
        self.log.append(float(self._value))
        return self.log[-1]


@pytest.fixture
def on_the_way(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setattr(OnTheWay, "log", [])
    monkeypatch.setattr(late, "LateNumber", OnTheWay)
    return OnTheWay.log


def loss(value: float) -> Tensor:
    return torch.tensor(value)


def test_the_newest_is_left_until_all_are_wanted(on_the_way: list[float]) -> None:
    history = History()
    steps = LateSteps(history, SETTINGS)
    for step, value in enumerate((3.0, 2.5, 2.0), 1):
        steps.add(step, loss(value), 15, CommTimer())
        steps.read(all_of_them=False)
    assert on_the_way == [3.0, 2.5]
    assert (history.since.steps, history.since.loss, history.since.tokens) == (2, 5.5, 30)
    steps.read()
    assert (history.since.steps, history.since.loss, history.since.tokens) == (3, 7.5, 45)
    steps.read()
    assert on_the_way == [3.0, 2.5, 2.0]


def test_what_is_there_is_read_at_once() -> None:
    history = History()
    steps = LateSteps(history, SETTINGS)
    steps.add(1, loss(3.0), 15, CommTimer())
    steps.read(all_of_them=False)
    assert history.since.steps == 1


def test_a_loss_that_is_not_finite_is_said_of_its_step(on_the_way: list[float]) -> None:
    steps = LateSteps(History(), SETTINGS)
    steps.add(1, loss(nan), 15, CommTimer())
    steps.read(all_of_them=False)
    steps.add(2, loss(1.0), 15, CommTimer())
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1: try a lower train.lr \(now 0.01\)"):
        steps.read(all_of_them=False)


def test_a_checkpoint_holds_all_steps_and_none_that_failed(on_the_way: list[float]) -> None:
    history = History()
    steps = LateSteps(history, SETTINGS)
    history.settle = steps.read
    steps.add(1, loss(3.0), 15, CommTimer())
    assert history.state()["since"]["loss"] == 3.0
    steps.add(2, loss(nan), 15, CommTimer())
    with pytest.raises(TrainingError, match="at step 2"):
        history.state()


def test_the_communication_of_a_step_counts_when_it_is_read(on_the_way: list[float]) -> None:
    history = History()
    steps = LateSteps(history, SETTINGS)
    for seconds in (0.25, 0.5):
        clock = CommTimer()
        clock.add(seconds)
        steps.add(1, loss(1.0), 15, clock)
        steps.read(all_of_them=False)
    assert history.since.communicating == 0.25
    steps.read()
    assert history.since.communicating == 0.75


def run(world_size: int, after_step: Callable[[History], bool]) -> History:
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp"))
    config = Config(model=SIZES, train=SETTINGS)
    torch.manual_seed(4)
    model = build(config, 256, mesh)
    optimizer = make_optimizer(model, SETTINGS)
    return train(model, optimizer, config, TEXT, Report(shown=False), Metrics(None), None, after_step)


@distributed(world_size=[2], backend="shm")
def test_what_is_written_is_the_same(world_size: int) -> None:
    """Losses that come late leave the same history as losses that are there, and are read when they are needed."""
    found: list[History] = []
    reads: list[int] = []

    def after_step(history: History) -> bool:
        reads.append(len(OnTheWay.log))
        return False

    for number in (LateNumber, OnTheWay):
        reads.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(late, "LateNumber", number)
            patch.setattr(OnTheWay, "log", [])
            found.append(run(world_size, after_step))
    assert found[0].train == found[1].train
    assert found[0].held_out == found[1].held_out
    assert found[0].tokens == found[1].tokens == 9 * 3 * 5
    assert all(isfinite(value) for _, value in found[0].train)
    assert reads == [1, 1, 2, 4, 4, 5, 6, 8, 9]  # lines are written after steps 1, 4, 8 and 9
    assert 0 < found[1].communication_share < 1


@distributed(world_size=[2], backend="shm")
def test_a_run_that_is_stopped_knows_all_its_steps(world_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(late, "LateNumber", OnTheWay)
        history = run(world_size, lambda history: history.step == 3)
    assert history.step == 3
    assert history.since.steps == 2  # the first was written
