"""The functions that a step of one device calls, in order, and others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardgrad.verification.record import outputs_told

Slot = int | str
"""Where a call has a number: the place of an argument, the name of a keyword, or `TIMES`."""
TIMES: Slot = "times"
"""No argument: what the first one is multiplied with, which is 1."""
_ARITHMETIC = {f"{r}{name}" for name in ("mul", "div", "truediv", "add", "sub", "pow") for r in ("", "r")}
_EPSILON = {"layer_norm": 4, "rms_norm": 3, "group_norm": 4, "batch_norm": 7}


@dataclass(frozen=True)
class Call:
    """One call of a function."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, given by its place or by its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def numbers(self) -> dict[Slot, float]:
        """The constants that the result depends on smoothly."""
        if self.name in _ARITHMETIC:
            found: dict[Slot, float] = {
                at: float(value)
                for at, value in enumerate(self.args[:2])
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            return found if any(isinstance(value, Tensor) and value.is_floating_point() for value in self.args) else {}
        if self.name in _EPSILON:
            eps = self.get(_EPSILON[self.name], "eps", 1e-5)
            return {} if eps is None else {"eps": float(eps)}
        if self.name == "scaled_dot_product_attention":
            scale = self.kwargs.get("scale")
            return {"scale": float(scale or self.args[0].shape[-1] ** -0.5)}
        return {TIMES: 1.0} if self.name == "softmax" else {}

    def with_number(self, slot: Slot, value: float) -> Any:
        """The result with another constant."""
        if slot == TIMES:
            return self.func(self.args[0] * value, *self.args[1:], **self.kwargs)
        place = _EPSILON.get(self.name, len(self.args)) if slot == "eps" else slot
        if isinstance(place, int) and place < len(self.args):
            return self.func(*self.args[:place], value, *self.args[place + 1 :], **self.kwargs)
        return self.func(*self.args, **{**self.kwargs, str(slot): value})


Instead = Callable[[Call], Any]
Which = tuple[str, int]
"""A call of a step: the function's name, and how often it had been called before."""


@dataclass(frozen=True)
class Noted:
    """A call without its tensors: which, the constants in it, and the sizes of its first tensor."""

    which: Which
    numbers: Mapping[Slot, float]
    shape: tuple[int, ...]


class _Mode(TorchFunctionMode):
    def __init__(self, instead: Mapping[Which, Instead], noted: list[Noted] | None = None) -> None:
        super().__init__()
        self.counts, self.instead, self.noted = dict[str, int](), instead, noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(getattr(func, "__name__", "").strip("_"), func, tuple(args), dict(kwargs or {}))
        which = call.name, self.counts.get(call.name, 0)
        self.counts[call.name] = which[1] + 1
        result = self.instead[which](call) if which in self.instead else call.run()
        if self.noted is not None:
            shape = next((tuple(t.shape) for t in (*call.args, result) if isinstance(t, Tensor)), ())
            self.noted.append(Noted(which, call.numbers(), shape))
        return result


@dataclass(frozen=True, eq=False)
class Change:
    """What is done otherwise in a step of one device.

    around: entered with the model, which is a copy, while the step runs.
    deep: whether gradients become other ones too although no output does.
    """

    around: Callable[[nn.Module], Any]
    deep: bool = False


def calling(instead: Mapping[Which, Instead]) -> Change:
    """Other functions in the place of some calls, by their numbers."""
    return Change(lambda model: _Mode(instead))


class NotThis(ValueError):
    """What should be done otherwise is not done at all."""


class Applied:
    """Other functions in the place of those calls to which they apply; a step in which none does is none."""

    def __init__(self, instead: Mapping[Which, Instead]) -> None:
        self.instead, self.count = instead, 0
        self.change = Change(self._around)

    @contextmanager
    def _around(self, model: nn.Module) -> Iterator[None]:
        with _Mode({which: partial(self._tried, make) for which, make in self.instead.items()}):
            yield
        if not self.count:
            raise NotThis

    def _tried(self, make: Instead, call: Call) -> Any:
        try:
            made = make(call)
        except NotThis:
            return call.run()
        self.count += 1
        return made


class Watch:
    """The calls of a step in order, and how many had been made when a module's output was there."""

    def __init__(self) -> None:
        self.calls: list[Noted] = []
        self.outputs: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.change = Change(self._around)

    @contextmanager
    def _around(self, model: nn.Module) -> Iterator[None]:
        def seen(name: str, tensor: Tensor) -> None:
            self.outputs[name], self.shapes[name] = len(self.calls), tuple(tensor.shape)

        with outputs_told(model, seen), _Mode({}, self.calls):
            yield
