"""One step of a model with everything that is compared written down, in the order in which it was computed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
NORM: Key = ("norm", "all gradients")
_SECOND = 0.625
"""The second step's gradients, in those of the first."""


@dataclass
class Recording:
    """What one step computed.

    tensors: copies, by kind and name, in the order of execution.
    same: outputs that are the very tensor of an earlier output (a container returns what its last layer does).
    calls: how often each module was called in forward, by its path.
    inputs: the floating tensors of the batch, which should get gradients.
    ends: outputs that are what the model returns, or what is differentiated.
    result: what was differentiated: the loss, or the output that a random gradient was given.
    asked: the dtypes that the program has cast to, where they were watched.
    draws: whether it drew random numbers.
    """

    tensors: dict[Key, Tensor] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)
    ends: set[str] = field(default_factory=set)
    result: Tensor | None = None
    asked: frozenset[torch.dtype] = frozenset()
    draws: bool = False

    def put(self, key: Key, tensor: Tensor) -> None:
        self.tensors.pop(key, None)  # a gradient that comes in several parts is complete with the last
        self.tensors[key] = tensor.detach().clone()


@dataclass(frozen=True)
class Update:
    """What comes after backward: clipping the gradients' norm, if it is known how, and a step of the optimizer.

    again: whether the optimizer takes a second step, with gradients of another size: in the first one, Adam's β₂ and a
        dampening show nothing.
    """

    clip: Callable[[nn.Module, float], Tensor] | None
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    max_norm: float
    again: bool = False

    def run(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], recording: Recording) -> None:
        """Leaves the parameters and the gradients changed."""
        sparse = any(one.grad is not None and one.grad.is_sparse for one in parameters.values())
        if self.clip is not None and not sparse:  # of sparse gradients torch knows no norm
            recording.put(NORM, self.clip(model, self.max_norm))
        optimizer = self.optimizer(list(parameters.values()))
        kinds: tuple[Kind, ...] = ("step", "second step") if self.again else ("step",)
        for kind in kinds:
            optimizer.step()
            for name, parameter in parameters.items():
                recording.put((kind, name), parameter)
                gradient = gradient_of(parameter)
                if gradient is not None:
                    gradient.mul_(_SECOND)


def forward_backward(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    gradient: Callable[[Tensor], Tensor],
    complete: Callable[[nn.Module], object] | None = None,
    *,
    inputs_too: bool = True,
) -> Recording:
    """Forward and backward of one step. Gradients are left in the parameters.

    Args:
        gradient: the gradient to give to a result that is no scalar.
        complete: called after backward, before gradients are taken.
        inputs_too: whether the floating tensors of the batch get gradients.

    Raises:
        ValueError: the result holds no tensor to differentiate.
    """
    recording, drawn = Recording(), torch.get_rng_state()
    held: dict[int, tuple[str, Tensor]] = {}  # outputs are kept alive, so that an id stays one tensor's
    handles: list[RemovableHandle] = []

    def watch(name: str, tensor: Tensor) -> None:
        if id(tensor) in held:
            recording.same[name] = held[id(tensor)][0]
        if name.startswith(WHOLE):
            recording.ends |= {name, recording.same.get(name, name)}
        held.setdefault(id(tensor), (name, tensor))
        recording.put(("output", name), tensor)
        if tensor.requires_grad:
            handles.append(tensor.register_hook(partial(recording.put, ("output gradient", name))))

    inputs, leaves = differentiable(batch) if inputs_too else (batch, {})
    for name, leaf in leaves.items():
        recording.inputs.add(name)
        handles.append(leaf.register_hook(partial(recording.put, ("input gradient", name))))
    for name, parameter in parameters.items():
        parameter.grad = None
        if getattr(parameter, "main_grad", None) is not None:
            parameter.main_grad.zero_()  # type: ignore[attr-defined]
        if parameter.requires_grad:
            handles.append(
                parameter.register_post_accumulate_grad_hook(partial(_keep_gradient, recording, ("gradient", name)))
            )
    try:
        with outputs_told(model, watch, recording.calls):  # what backward recomputes is no further call
            found = loss(model, **inputs) if isinstance(inputs, Mapping) else loss(model, *inputs)
        result = result_of(found)
        if result is None or not result.requires_grad:
            raise ValueError(
                f"{type(model).__name__} gave nothing to differentiate: {type(found).__name__}. Let "
                "loss(model, *batch) return the loss, or the output"
            )
        recording.result = result.detach()
        recording.ends |= {held[id(result)][0]} if id(result) in held else set()
        if result.dim() == 0:
            recording.put(LOSS, result)
            result.backward()
        else:
            result.backward(gradient(result.detach()))
        if complete is not None:
            complete(model)
    finally:
        for handle in handles:
            handle.remove()
    recording.draws = not torch.equal(drawn, torch.get_rng_state())
    for name, buffer in model.named_buffers():
        recording.put(("buffer", name), buffer)
    for name, leaf in leaves.items():  # of several backwards, which a loss function may do by itself, the sum
        if leaf.grad is not None:
            recording.tensors["input gradient", name] = leaf.grad
    for name, parameter in parameters.items():  # as the optimizer sees it: DDP reduces it after the hooks
        grad = gradient_of(parameter)
        if grad is not None:
            recording.tensors["gradient", name] = (grad.to_dense() if grad.is_sparse else grad).detach().clone()
    return recording


@contextmanager
def outputs_told(
    model: nn.Module, tell: Callable[[str, Tensor], None], calls: dict[str, int] | None = None
) -> Iterator[None]:
    """Tell of every tensor that a module returns, by its name in a recording; `calls` counts calls, by path."""
    calls = {} if calls is None else calls

    def seen(path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        calls[path] = calls.get(path, 0) + 1
        name = (path or WHOLE) + (f"#{calls[path]}" if calls[path] > 1 else "")
        for at, tensor in enumerate(tensors_in(output)):
            tell(f"{name}[{at}]" if at else name, tensor)

    handles = [module.register_forward_hook(partial(seen, path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient, or the buffer `main_grad` in which it is summed."""
    return parameter.grad if parameter.grad is not None else getattr(parameter, "main_grad", None)


def _keep_gradient(recording: Recording, key: Key, parameter: nn.Parameter) -> None:
    if parameter.grad is not None and not parameter.grad.is_sparse:
        recording.put(key, parameter.grad)


def result_of(found: Any) -> Tensor | None:
    """What a step differentiates of what its loss function returned: `.loss`, `["loss"]`, or the first tensor."""
    said = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    return next(tensors_in(said), None) if said is not None else next(tensors_in(found), None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating tensors in nested tuples, lists, mappings and dataclasses, in order."""
    return (tensor for tensor in all_tensors_in(value) if tensor.is_floating_point())


def all_tensors_in(value: Any) -> Iterator[Tensor]:
    """The same, of every dtype."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from all_tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from all_tensors_in(part)
    elif dataclasses.is_dataclass(value):
        for one in dataclasses.fields(value):
            yield from all_tensors_in(getattr(value, one.name))


def mapped(value: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """A batch with its floating tensors changed, however they are nested; `change` gets each one's path (`0.mask`)."""
    if isinstance(value, Tensor):
        return change(path, value) if value.is_floating_point() else value
    inner = f"{path}." if path else ""
    if isinstance(value, Mapping):
        parts = {name: mapped(part, change, f"{inner}{name}") for name, part in value.items()}
        if type(value) is dict or not hasattr(value, "update"):
            return parts
        same: Any = copy.copy(value)  # a UserDict, a BatchEncoding
        same.update(parts)
        return same
    if isinstance(value, tuple | list):
        found = [mapped(part, change, f"{inner}{at}") for at, part in enumerate(value)]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        same = copy.copy(value)
        for one in dataclasses.fields(value):
            object.__setattr__(same, one.name, mapped(getattr(value, one.name), change, f"{inner}{one.name}"))
        return same
    return value


def differentiable(batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
    """The batch with its floating tensors as leaves that get gradients; and those, by name."""
    leaves: dict[str, Tensor] = {}

    def leaf(path: str, tensor: Tensor) -> Tensor:
        return leaves.setdefault(f"input {path}", tensor.detach().clone().requires_grad_())

    return mapped(batch, leaf), leaves
