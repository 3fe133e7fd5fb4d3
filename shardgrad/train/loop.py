"""The training loop: AdamW on local shards, a schedule, measurements."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.comm.mesh import view
from shardgrad.comm.pieces import exact
from shardgrad.comm.timer import comm_timer
from shardgrad.train import data
from shardgrad.train.config import Config
from shardgrad.train.history import History
from shardgrad.train.language_model import LanguageModel, evaluating
from shardgrad.train.late import LateSteps
from shardgrad.train.metrics import Metrics
from shardgrad.train.optimizer import learning_rate
from shardgrad.train.report import Report
from shardgrad.train.step import micro_batches, train_step
from shardgrad.verification.replicas import check_run


def filled_up(model: LanguageModel, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """In exact mode a batch whose sequences its pieces divide: with ones behind it whose tokens are not counted."""
    cuts = exact(view(model.mesh))
    missing = 0 if cuts is None else -len(ids) % prod(cuts[axis] for axis in model.token_axes)
    return F.pad(ids, (0, 0, 0, missing)), F.pad(targets, (0, 0, 0, missing), value=-100)


@torch.no_grad()
def held_out_loss(model: LanguageModel, text: data.Text, batch: int, batches: int | None = None) -> float:
    """Mean loss over the held-out part, or so many batches of it, in nats a token; alike on every rank."""
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    counts: list[int] = []
    with evaluating(model):
        for ids, targets in data.held_out(text, batch, model.seq_len, batches):
            counts.append(targets.numel())
            for mine in micro_batches(model, *data.on(device, *filled_up(model, ids, targets)), 1):
                losses.append(model.loss(*mine))
    # Read at the end: until then the host goes on before the device.
    return sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True)) / sum(counts)


def train(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    config: Config,
    text: data.Text,
    report: Report,
    metrics: Metrics,
    history: History | None = None,
    after_step: Callable[[History], bool] = lambda _: False,
) -> History:
    """Train up to `config.train.steps`; called on every rank.

    Args:
        history: of the steps done before; this goes on after them.
        after_step: called with the history after each step and what is measured after it; whether to end there.

    Raises:
        TrainingError: on every rank, if the loss is no longer finite. On CUDA that may be seen a step late: a loss is
            read when the device has been given the next step, or something is written.
    """
    settings = config.train
    device = next(model.parameters()).device
    history = History() if history is None else history
    late = LateSteps(history, settings)
    history.settle = late.read
    with report.progress(settings.steps, history.step, text.unit) as progress:
        for step in range(history.step, settings.steps):
            start = time.perf_counter()
            rate = learning_rate(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids, targets = data.batch(text, config.run.seed, step, settings.batch, model.seq_len)
            with comm_timer() as clock:
                loss = train_step(model, optimizer, *data.on(device, ids, targets), settings).loss
            done = history.step = step + 1
            last = done == settings.steps
            logs = done % settings.log_every == 0 or last or done == 1
            evaluates = done % settings.eval_every == 0 or last
            late.add(done, loss, targets.numel(), clock)
            late.read(all_of_them=logs or evaluates)
            since = history.since
            since.seconds += time.perf_counter() - start
            if settings.check_every and done % settings.check_every == 0:
                check_run(model, optimizer, done)
            if logs:
                history.train.append((done, since.mean_loss))
                metrics.write("train", step=done, lr=rate, **since.measured())
                progress(done, **since.measured())
                history.close_window()
            if evaluates:
                value = held_out_loss(model, text, settings.batch, settings.eval_batches)
                history.held_out.append((done, value))
                metrics.write("held_out", step=done, loss=value)
                progress(done, held_out=value)
            if after_step(history):
                late.read()
                break
    return history
