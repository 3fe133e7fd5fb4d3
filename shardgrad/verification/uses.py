"""The terms of a parameter's gradient: one for each time that a step uses the parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardgrad.verification.record import Loss


class _Apart(TorchFunctionMode):
    """Inside the block, every function that is given the parameter gets a leaf of its own with the same values."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter
        self.leaves: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def own(value: Any) -> Any:
            if value is self.parameter:
                leaf = self.parameter.detach().requires_grad_()
                self.leaves.append((getattr(func, "__name__", str(func)), leaf))
                return leaf
            return type(value)(map(own, value)) if type(value) in (list, tuple) else value

        return func(*own(tuple(args)), **{name: own(value) for name, value in (kwargs or {}).items()})


def gradients_by_use(parameter: nn.Parameter, loss: Loss, step: Callable[[Loss], None]) -> list[tuple[str, Tensor]]:
    """The function that uses the parameter, and the term of its gradient that comes back there; in order of forward.

    Args:
        step: runs forward and backward of a model that has the parameter, with the loss that it is given.
    """
    apart = _Apart(parameter)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with apart:
            return loss(*args, **kwargs)

    step(watched)
    return [(by, leaf.grad) for by, leaf in apart.leaves if leaf.grad is not None]
