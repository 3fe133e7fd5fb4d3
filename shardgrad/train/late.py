"""Losses that are read a step late, so that the host never waits for the step that it has just handed to the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm.timer import CommTimer
from shardgrad.train.config import Train
from shardgrad.train.history import History


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


class LateNumber:
    """A scalar of the device, copied to the host behind what computes it, while the host goes on.

    there: whether it is on the host already, as what is computed on a CPU.
    """

    def __init__(self, x: Tensor) -> None:
        self.there = x.device.type == "cpu"
        self._value = x
        if not self.there:
            self._value = torch.empty((), dtype=x.dtype, device="cpu", pin_memory=True)
            self._value.copy_(x, non_blocking=True)
            self._copied: Any = torch.get_device_module(x.device).Event()
            self._copied.record()

    def read(self) -> float:
        """Its value; this waits until it has been copied, and for nothing that was begun after it."""
        if not self.there:
            self._copied.synchronize()
        return float(self._value)


@dataclass(frozen=True)
class _Step:
    step: int
    loss: LateNumber
    tokens: int
    clock: CommTimer


class LateSteps:
    """Steps that are under way; what is known of them goes into `history.since`, in their order."""

    def __init__(self, history: History, settings: Train) -> None:
        self._history, self._settings = history, settings
        self._waiting: deque[_Step] = deque()

    def add(self, step: int, loss: Tensor, tokens: int, clock: CommTimer) -> None:
        """A step that the device has been given. clock: of its communication, whose block is over."""
        self._waiting.append(_Step(step, LateNumber(loss), tokens, clock))

    def read(self, *, all_of_them: bool = True) -> None:
        """Read the losses, without the newest one if that is still on the device and not `all_of_them` are wanted.

        Raises:
            TrainingError: on every rank, if a loss is not finite.
        """
        while self._waiting and (all_of_them or len(self._waiting) > 1 or self._waiting[0].loss.there):
            one = self._waiting.popleft()
            loss, settings = one.loss.read(), self._settings
            self._history.since.add(loss, one.tokens, one.clock.seconds)
            if not isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {one.step}: try a lower train.lr (now {settings.lr}) or a longer "
                    f"train.warmup (now {settings.warmup})"
                )
