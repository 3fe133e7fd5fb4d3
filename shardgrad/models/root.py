"""What a parallelized model does around each call: it watches the first of each kind, and minds its labels."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from shardgrad.models.flow import Flow, dropout_error, watching
from shardgrad.models.head import Head, same_inputs
from shardgrad.models.summed import sum_gradients
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_WORDS = ("dropout", "pdrop", "layerdrop", "jitter_noise")


class Root:
    """Kept with a model that `sg.parallelize` has changed, for all of its calls.

    model: as it was given. called: it, and the module in it that `generate` calls, if that is another one.
    """

    def __init__(self, model: nn.Module, called: list[nn.Module], parallel: Parallel, head: Head | None) -> None:
        self.parallel, self.head = parallel, head
        self._model = [model]
        self._seen: set[Any] = set()
        self._watched: Any = None  # the kind of call that is being watched
        self._depth = 0
        self._open = ExitStack()
        for module in called:
            module.register_forward_pre_hook(partial(self._before, _positional(module)), with_kwargs=True)
            module.register_forward_hook(self._after, always_call=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=ExitStack())

    def _before(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._depth += 1
        if self._depth > 1:
            return None
        given = {**dict(zip(names, args)), **kwargs}
        if not torch.is_grad_enabled():
            same_inputs(given, self.parallel)
        changed = given if self.head is None else self.head.before(given)
        self._watch(changed, max(0, len(args) - len(names)))
        return None if changed is given else ((), changed)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth = max(0, self._depth - 1)  # (a hook of somebody's may have raised before ours)
        if self._depth:
            return None
        self._open.close()
        if self._watched is not None and output is not None:  # one that raised is watched again
            self._seen.add(self._watched)
        self._watched = None
        return None if self.head is None or output is None else self.head.after(output)

    def _watch(self, given: dict[str, Any], more: int) -> None:
        """Follow the first call of each kind: with these arguments, and so many without names, in this mode."""
        named = frozenset(name for name, value in given.items() if value is not None)
        kind = named, more, self._model[0].training, torch.is_grad_enabled()
        if kind in self._seen:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "call the parallelized model once before compiling it whole: its first call of a kind shows which "
                "gradients are sums over ranks. (Blocks of it may be compiled before: they run as written in that call)"
            )
        self._open.enter_context(watching(Flow(self._model[0], self.parallel, self._found)))
        self._watched = kind

    def _found(self, module: nn.Module, name: str) -> None:
        sum_gradients(module, name, self.parallel, self.parallel.axis)


def _positional(module: nn.Module) -> list[str]:
    """The names of the arguments that a module's forward takes by place."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.POSITIONAL_ONLY)]


def sum_over_data(model: nn.Module, parallel: Parallel) -> None:
    """Sum the gradients of all that no layer of ours owns over the data parallel axis."""
    assert parallel.data is not None
    for module in list(model.modules()):
        if not isinstance(module, ShardedModule):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    sum_gradients(module, name, parallel, parallel.data.axis)


def is_dropout(attribute: str, value: object) -> bool:
    """Whether an attribute of a module or a configuration is a probability of dropping something, and not 0."""
    return isinstance(value, float) and value > 0 and any(word in attribute for word in _WORDS)


def refuse_dropout(model: nn.Module) -> None:
    """Raise for dropout that is active, or would be in training.

    Raises:
        LayoutError: a module drops elements, or is told a probability of it.
    """
    for name, module in model.named_modules():
        if isinstance(module, _DROPOUT):
            if module.p:
                raise dropout_error(name, module.p)
            continue
        for attribute, value in vars(module).items():
            if is_dropout(attribute, value):
                raise dropout_error(f"{name}.{attribute}", value)
