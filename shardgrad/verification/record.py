"""One step of a model with everything that is compared written down, in the order in which it was computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shardgrad.verification.observed import Kind

Key = tuple[Kind, str]
Batch = Sequence[Any] | Mapping[str, Any]
Loss = Callable[..., Any]
WHOLE = "(model)"
LOSS: Key = ("loss", "loss")
NORM: Key = ("norm", "norm of all gradients")


@dataclass
class Recording:
    """What one step computed.

    tensors: copies, by kind and name, in the order of execution.
    same: outputs that are the very tensor of an earlier output (a container returns what its last layer does).
    calls: how often each module was called in forward, by its path.
    inputs: the floating tensors of the batch, which should get gradients.
    result: what was differentiated: the loss, or the output that a random gradient was given.
    """

    tensors: dict[Key, Tensor] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)
    result: Tensor | None = None

    def put(self, key: Key, tensor: Tensor) -> None:
        self.tensors.pop(key, None)  # a gradient that comes in several parts is complete with the last
        self.tensors[key] = tensor.detach().clone()


@dataclass(frozen=True)
class Update:
    """What comes after backward: clipping the gradients' norm, if it is known how, and a step of the optimizer."""

    clip: Callable[[nn.Module, float], Tensor] | None
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    max_norm: float

    def run(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], recording: Recording) -> None:
        """Leaves the parameters changed."""
        if self.clip is not None:
            recording.put(NORM, self.clip(model, self.max_norm))
        self.optimizer(list(parameters.values())).step()
        for name, parameter in parameters.items():
            recording.put(("step", name), parameter)


def forward_backward(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    gradient: Callable[[Tensor], Tensor],
    complete: Callable[[nn.Module], object] | None = None,
) -> Recording:
    """Forward and backward of one step. Gradients are left in the parameters.

    Args:
        gradient: the gradient to give to a result that is no scalar.
        complete: called after backward, before gradients are taken.

    Raises:
        ValueError: the result holds no tensor to differentiate.
    """
    recording = Recording()
    held: dict[int, tuple[str, Tensor]] = {}  # outputs are kept alive, so that an id stays one tensor's
    calls = recording.calls
    handles: list[RemovableHandle] = []
    in_forward: list[RemovableHandle] = []

    def seen(path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        calls[path] = calls.get(path, 0) + 1
        name = (path or WHOLE) + (f"#{calls[path]}" if calls[path] > 1 else "")
        for at, tensor in enumerate(tensors_in(output)):
            watch("output", f"{name}[{at}]" if at else name, tensor)

    def watch(kind: Kind, name: str, tensor: Tensor) -> None:
        if id(tensor) in held:
            recording.same[name] = held[id(tensor)][0]
        held.setdefault(id(tensor), (name, tensor))
        recording.put((kind, name), tensor)
        if tensor.requires_grad:
            handles.append(tensor.register_hook(partial(_keep, recording, ("output gradient", name))))

    for path, module in model.named_modules():
        in_forward.append(module.register_forward_hook(partial(seen, path)))
    inputs = differentiable(batch)
    for name, leaf in _leaves(inputs):
        recording.inputs.add(name)
        handles.append(leaf.register_hook(partial(_keep, recording, ("input gradient", name))))
    for name, parameter in parameters.items():
        parameter.grad = None
        if getattr(parameter, "main_grad", None) is not None:
            parameter.main_grad.zero_()  # type: ignore[attr-defined]
        if parameter.requires_grad:
            handles.append(
                parameter.register_post_accumulate_grad_hook(partial(_keep_gradient, recording, ("gradient", name)))
            )
    try:
        found = loss(model, **inputs) if isinstance(inputs, Mapping) else loss(model, *inputs)
        while in_forward:  # what backward recomputes is no further call
            in_forward.pop().remove()
        result = next(iter(tensors_in(getattr(found, "loss", None))), None)
        if result is None:
            result = next(iter(tensors_in(found)), None)
        if result is None or not result.requires_grad:
            raise ValueError(
                f"{type(model).__name__} gave nothing to differentiate: {type(found).__name__}. Let "
                "loss(model, *batch) return the loss, or the output"
            )
        recording.result = result.detach()
        if result.dim() == 0:
            recording.put(LOSS, result)
            result.backward()
        else:
            result.backward(gradient(result.detach()))
        if complete is not None:
            complete(model)
    finally:
        for handle in [*handles, *in_forward]:
            handle.remove()
    for name, parameter in parameters.items():  # as the optimizer sees it: DDP reduces it after the hooks
        grad = gradient_of(parameter)
        if grad is not None:
            recording.tensors["gradient", name] = grad.detach().clone()
    return recording


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient, or the buffer `main_grad` in which it is summed."""
    return parameter.grad if parameter.grad is not None else getattr(parameter, "main_grad", None)


def _keep(recording: Recording, key: Key, gradient: Tensor) -> None:
    recording.put(key, gradient)


def _keep_gradient(recording: Recording, key: Key, parameter: nn.Parameter) -> None:
    if parameter.grad is not None:
        recording.put(key, parameter.grad)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def differentiable(batch: Batch) -> Batch:
    """The batch with its floating tensors as leaves that get gradients."""

    def leaf(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if is_float else value

    if isinstance(batch, Mapping):
        return {name: leaf(value) for name, value in batch.items()}
    return tuple(leaf(value) for value in batch)


def _leaves(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for name, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch):
        if isinstance(value, Tensor) and value.requires_grad:
            yield f"input {name}", value
