"""A device that no machine has: its tensors have shapes and no values, and are not the host's.

With it a machine without a GPU shows where a program would have the host wait for one: where it reads a value, copies
between host and device, or makes a shape of values. Importing this makes it known; a process can have one.
"""

from __future__ import annotations

import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "imagined"


class _Stream:
    """The device's one stream."""

    def record_event(self) -> None:
        pass


_STREAM = _Stream()


class _Module(types.ModuleType):
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def current_stream(self, device: Any = None) -> _Stream:
        return _STREAM

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


_setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module(NAME))


class HostWaits(AssertionError):
    """The host would wait for the device here."""


class _Watch(TorchDispatchMode):
    """Refuses copies between host and device; what reads values, or makes shapes of them, torch itself refuses where
    there are none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, first = func.overloadpacket.__name__, args[0] if args else None
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            here, sources = first.device, [one for one in tree_leaves(args[1]) if isinstance(one, Tensor)]
        elif name in ("copy_", "_to_copy"):
            here, sources = kwargs.get("device") or first.device, [args[-1]]
        else:
            here, sources = torch.device(NAME), []
        if any(one.device.type != torch.device(here).type for one in sources):
            frame = next(one for one in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in one.filename)
            raise HostWaits(f"{name} from {sources[0].device}, {frame.filename}:{frame.lineno}: {frame.line}")
        return func(*args, **kwargs)


WAITS = HostWaits, DataDependentOutputException, DynamicOutputShapeException, NotImplementedError
"""What says that the host would wait; the last: a tensor of the device made of a list, which FakeTensorMode cannot."""


@contextmanager
def imagined_device() -> Iterator[None]:
    """A block whose new tensors are on the device unless they say otherwise."""
    with FakeTensorMode(), torch.device(NAME):
        yield


def refuse_waits() -> TorchDispatchMode:
    """A block, inside the other one, in which one of WAITS is raised where the host would wait for the device."""
    return _Watch()
