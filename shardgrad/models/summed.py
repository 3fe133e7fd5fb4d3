"""Parameters of somebody's modules whose gradients are sums over ranks: each read of one enters it."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn

from shardgrad.comm.adjoint import replicate
from shardgrad.models.flow import current
from shardgrad.nn.parallel import Parallel


class _Summed:
    """A parameter as an attribute of its module's class: read, it is entered over axes."""

    def __init__(self, name: str, parallel: Parallel) -> None:
        self.name, self.parallel = name, parallel
        self.axes: list[str] = []

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> object:
        if module is None:
            return self
        value = module._parameters[self.name]
        if value is None or not value.requires_grad:
            return value
        entered: Tensor = value
        flow = current()
        with nullcontext() if flow is None else flow.not_watching():
            for axis in self.axes:
                entered = replicate(entered, self.parallel.mesh, axis)
        if flow is not None and self.parallel.axis in self.axes:
            flow.is_sharded(entered)
        elif flow is not None:
            flow.is_parameter(entered, module, self.name)
        return entered

    def __set__(self, module: nn.Module, value: object) -> None:
        """A data descriptor is found before the module's own dictionaries; a module registers parameters by itself."""
        raise AttributeError(self.name)


def sum_gradients(module: nn.Module, name: str, parallel: Parallel, axis: str) -> None:
    """From now on, sum the gradient of a module's own parameter over an axis.

    The module gets a class of its own, below its class and of its name, in which the parameter is an attribute that
    enters it: state, names and optimizer see the parameter itself, what computes sees it entered.
    """
    kind = type(module)
    if not kind.__dict__.get("_sums_gradients"):
        kind = type(kind.__name__, (kind,), {"_sums_gradients": True, "__module__": kind.__module__})
        module.__class__ = kind
    known = kind.__dict__.get(name)
    if known is None:
        known = _Summed(name, parallel)
        setattr(kind, name, known)
    if axis not in known.axes:
        known.axes.append(axis)
