"""What a parallelized model does around each call: it watches the first of each kind, and minds its labels."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

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

    def __init__(self, model: nn.Module, called: list[nn.Module], parallel: Parallel) -> None:
        self.parallel = parallel
        self.head: Head | None = None
        self._model = [model]
        self._seen: set[Any] = set()
        self._flow: Flow | None = None
        self._depth = 0
        self._open = ExitStack()
        for module in called:
            names = [
                p.name
                for p in inspect.signature(module.forward).parameters.values()
                if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)
            ]
            module.register_forward_pre_hook(self._before(names), with_kwargs=True)
            module.register_forward_hook(self._after, always_call=True)

    def __deepcopy__(self, memo: Any) -> Root:
        raise TypeError(
            "a parallelized model cannot be copied: its hooks belong to its layers. Make and parallelize another"
        )

    def notice(self, tensor: Tensor, differs: bool = True) -> None:
        """Tell whoever watches that a tensor differs between ranks, or not."""
        if self._flow is not None:
            (self._flow.is_sharded if differs else self._flow.is_replicated)(tensor)

    def not_watching(self) -> Any:
        return ExitStack() if self._flow is None else self._flow.not_watching()

    def _before(self, names: list[str]) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._depth += 1
            if self._depth > 1:
                return args, kwargs
            given = {**dict(zip(names, args)), **kwargs}
            if len(args) > len(names):
                given, args_ = kwargs, args
            else:
                args_ = ()
            if not torch.is_grad_enabled():
                same_inputs(given, self.parallel)
            if self.head is not None:
                given = self.head.before(given)
            self._watch(module, given)
            return args_, given

        return before

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth:
            return None
        flow, self._flow = self._flow, None
        if flow is not None:
            self._open.close()
        return None if self.head is None or output is None else self.head.after(output)

    def _watch(self, module: nn.Module, given: dict[str, Any]) -> None:
        kind = (
            frozenset(name for name, value in given.items() if value is not None),
            self._model[0].training,
            torch.is_grad_enabled(),
        )
        if kind in self._seen:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "call the parallelized model once before compiling it whole: its first call of a kind shows which gradients "
                "are sums over ranks. (Blocks of it may be compiled before: they run as written in that call)"
            )
        flow = Flow(self._model[0], self.parallel, self._found)
        self._open.enter_context(watching(flow))
        self._flow = flow
        self._seen.add(kind)

    def _found(self, module: nn.Module, name: str) -> None:
        sum_gradients(module, name, self.parallel, self.parallel.axis, self._entered)

    def over_data(self) -> None:
        """Sum the gradients of all that no layer of ours owns over the data parallel axis."""
        assert self.parallel.data is not None
        for module in list(self._model[0].modules()):
            if not isinstance(module, ShardedModule):
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        sum_gradients(module, name, self.parallel, self.parallel.data.axis, self._entered)

    def _entered(self, tensor: Tensor, module: nn.Module, name: str, axes: list[str]) -> None:
        if self._flow is not None:
            if self.parallel.axis in axes:
                self._flow.is_sharded(tensor)
            else:
                self._flow.is_parameter(tensor, module, name)


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
            if isinstance(value, float) and value > 0 and any(word in attribute for word in _WORDS):
                raise dropout_error(f"{name}.{attribute}", value)
