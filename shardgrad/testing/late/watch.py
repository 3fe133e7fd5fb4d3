"""`late_watch`: a block of a program whose faults are collected, each with its lines, and raised at its end."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardgrad.comm import shim

from .findings import Ledger, RaceError, Report, ledger
from .together import compare_orders

_OWN = (Tensor, torch.nn.Parameter)

# Operators of these namespaces are collectives, which look at their tensors themselves, or hold such.
_NAMESPACES = ("c10d", "shardgrad", "higher_order")

# They wait, or hand on.
_WAITS = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")

# They look at a tensor's shape alone.
_SHAPE_ONLY = """
    empty_like new_empty new_empty_strided new_zeros new_ones new_full zeros_like ones_like full_like rand_like
    randn_like randint_like is_same_size record_stream _unsafe_view lift_fresh size stride numel sym_size sym_numel
"""
_IDLE = frozenset(_WAITS) | {f"aten::{name}" for name in _SHAPE_ONLY.split()}

# They write what they are given without reading it.
_FILL = ("fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "set_")
_FILLS = frozenset(f"aten::{name}" for name in _FILL)

# Methods that read a tensor's memory past the dispatcher.
_READ = ("numpy", "tolist", "__array__", "__dlpack__", "__repr__", "__format__", "__deepcopy__")
_READERS = {getattr(Tensor, name): name for name in _READ}


@contextmanager
def late_watch(raises: bool = True) -> Iterator[Report]:
    """Collect what a block does wrong with the backend `late`, in the thread that it runs in. Called by all ranks.

    Inside the block the operation that reads what has not come, or writes what is being sent, is named with its line
    and that of the collective; without it only the values tell. At the end the ranks compare the orders of their
    collectives over all groups.

    raises: whether the block ends with an error if there are findings; else they are to be read from the report.

    Raises:
        RaceError: there are findings.
    """
    report = Report()
    ledger.reports.append(report)
    before = len(ledger.launches)
    failure: Exception | None = None
    try:
        with ExitStack() as stack:
            stack.enter_context(_Reads())
            stack.enter_context(_Operations())
            yield report
    except Exception as error:
        failure = error
        raise
    finally:
        _end(report, before, failure)
        ledger.reports.remove(report)
        if report.findings and raises:
            raise RaceError(_told(report), report.findings) from failure


def _end(report: Report, before: int, failure: Exception | None) -> None:
    if ledger.open and failure is None:
        gc.collect()  # a work in a circle of references is dropped, too
    findings, notes = compare_orders(list(ledger.launches)[before:], failure is not None)
    while len(ledger.launches) > before:  # a block around this one compares the rest
        ledger.launches.pop()
    for finding in findings:
        report.add(finding)
    report.notes += notes
    if not report.collectives and dist.is_initialized() and "late" not in (config := dist.get_backend_config()):
        report.notes.append(f"nothing was watched: no collective ran on late, and the default group is on {config}")
        warnings.warn(f"late_watch: {report.notes[-1]}", stacklevel=2)


def _told(report: Report) -> str:
    count = len(report.findings)
    return f"{count} fault{'s' * (count != 1)} that CPUs do not show and GPUs may:\n{report}"


class _Operations(shim.TorchDispatchMode):
    """Looks at what every operator reads and writes, while collectives are under way."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        others = [kind for kind in types if kind not in _OWN]
        if others and not any(kind.__module__.startswith("torch._subclasses") for kind in others):
            return NotImplemented  # a DTensor, say, comes back with the tensors that it is made of; fake ones have none
        kwargs = kwargs or {}
        if ledger.open and func.namespace not in _NAMESPACES and func._schema.name not in _IDLE:
            _look(ledger, func, args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether compiled code may run as such under this mode: what is in a kernel is not seen, and NaN tells."""
        return True


def _look(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> None:
    if getattr(func, "is_view", False):
        return
    fills = func._schema.name in _FILLS
    for at, argument in enumerate(func._schema.arguments):
        value = args[at] if at < len(args) else kwargs.get(argument.name)
        if value is None or isinstance(value, int | float | str):
            continue
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for x in shim.tree_iter(value):
            if _has_memory(x):
                ledger.check_use(str(func), x, writes, writes and (argument.is_out or (fills and at == 0)))


class _Reads(TorchFunctionMode):
    """Looks at the methods that hand out a tensor's memory, of which the dispatcher knows nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if ledger.open and func in _READERS and _has_memory(args[0]):
            ledger.check_use(f"Tensor.{_READERS[func]}", args[0], writes=False)
        return func(*args, **(kwargs or {}))


def _has_memory(x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and type(x) in _OWN
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and not shim.is_transformed(x)
    )
