"""The training loop: AdamW on local shards, a schedule, measurements."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import cos, isfinite, pi

import torch
from torch import nn

from shardgrad.comm.collectives import communication_clock
from shardgrad.nn.stored import stored_parameters
from shardgrad.train import data
from shardgrad.train.config import Config, Train
from shardgrad.train.metrics import Metrics
from shardgrad.train.model import GPT
from shardgrad.train.report import Report
from shardgrad.verification.replicas import check_run


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass
class History:
    """Losses in nats a byte, by steps done; and over the whole run: bytes trained on, seconds of training (held-out
    evaluation apart), and this rank's share of them spent in communication."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    communicating: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def communication_share(self) -> float:
        return self.communicating / self.seconds


def make_optimizer(model: nn.Module, config: Train) -> torch.optim.AdamW:
    """AdamW on this rank's shards: elementwise, so no rank needs another's. Weight decay on matrices alone."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter, stored in stored_parameters(model):
        matrix = stored is not None and len(stored.shape) > 1 and not name.endswith("bias")
        (decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def learning_rate(config: Train, step: int) -> float:
    """At step 0, 1, …: rises linearly over `warmup` steps to `lr`, then falls by half a cosine to a tenth of it."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + cos(pi * done)))


@torch.no_grad()
def held_out_loss(model: GPT, text: data.Text, batch: int) -> float:
    """Mean loss over the whole held-out part, in nats a byte; alike on every rank."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for ids, targets in data.held_out(text, batch, model.seq_len):
        total += float(model.loss(ids.to(device), targets.to(device))) * targets.numel()
        count += targets.numel()
    return total / count


def train(
    model: GPT, optimizer: torch.optim.Optimizer, config: Config, text: data.Text, report: Report, metrics: Metrics
) -> History:
    """Train for `config.train.steps`; called on every rank.

    Raises:
        TrainingError: on every rank, if the loss is no longer finite.
    """
    settings = config.train
    device = next(model.parameters()).device
    history = History()
    since = _Window()
    with communication_clock() as clock, report.progress(settings.steps) as progress:
        for step in range(settings.steps):
            start, before = time.perf_counter(), clock.seconds
            rate = learning_rate(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids, targets = data.batch(text, config.run.seed, step, settings.batch, model.seq_len)
            optimizer.zero_grad()
            loss = model.loss(ids.to(device), targets.to(device))
            loss.backward()
            optimizer.step()
            since.add(loss.item(), targets.numel(), time.perf_counter() - start, clock.seconds - before)
            done = step + 1
            if settings.check_every and done % settings.check_every == 0:
                check_run(model, optimizer, done)
            last = done == settings.steps
            if not isfinite(since.loss):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {done}: try a lower train.lr (now {settings.lr}) or a longer "
                    f"train.warmup (now {settings.warmup})"
                )
            if done % settings.log_every == 0 or last or done == 1:
                history.train.append((done, since.mean_loss))
                metrics.write("train", step=done, lr=rate, **since.measured())
                progress(done, **since.measured())
                since.into(history)
                since = _Window()
            if done % settings.eval_every == 0 or last:
                value = held_out_loss(model, text, settings.batch)
                history.held_out.append((done, value))
                metrics.write("held_out", step=done, loss=value)
                progress(done, held_out=value)
    return history


@dataclass
class _Window:
    """What was measured since the last report."""

    loss: float = 0.0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    communicating: float = 0.0

    def add(self, loss: float, tokens: int, seconds: float, communicating: float) -> None:
        self.loss += loss
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.communicating += communicating

    @property
    def mean_loss(self) -> float:
        return self.loss / self.steps

    def measured(self) -> dict[str, float]:
        return {
            "loss": self.mean_loss,
            "tokens_per_second": self.tokens / self.seconds,
            "communication_share": self.communicating / self.seconds,
        }

    def into(self, history: History) -> None:
        history.tokens += self.tokens
        history.seconds += self.seconds
        history.communicating += self.communicating
