"""What a function reads, kept in order and in memory where it is called on another stream of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Inputs:
    """The tensors that a function made inside another reads, as the current stream will have left them.

    Nothing on a CPU, which computes in the program's order.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._tensors = [one for one in _read_by(function) if one.device.type != "cpu"]
        if self._tensors:
            self._made_on = _current_stream(self._tensors[0])
            self._made = self._made_on.record_event()

    def ready(self) -> None:
        """Have the current stream wait until they are made, if that is on another one, and their memory last until it
        has read them: the allocator gives it back in the order of the stream it was taken on."""
        if not self._tensors:
            return
        here = _current_stream(self._tensors[0])
        if here != self._made_on:
            here.wait_event(self._made)
            for tensor in self._tensors:
                tensor.record_stream(here)


def _current_stream(tensor: Tensor) -> Any:
    return torch.get_device_module(tensor.device).current_stream(tensor.device)


def _read_by(function: Callable[..., Any]) -> Iterator[Tensor]:
    """The tensors among a function's free variables, those in handles of collectives too."""
    waiting = [cell.cell_contents for cell in function.__closure__ or ()]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            waiting.extend(one)
