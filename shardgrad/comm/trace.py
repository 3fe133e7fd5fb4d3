"""What torch.distributed was really called for: every collective in a block, seen below all of shardgrad."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.mesh import axis_name
from shardgrad.layout.cost import sent, totals

# c10d operator -> (our word for it, position of the argument that holds the input)
_OPERATORS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 1),
    "allgather_": ("all-gather", 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "alltoall_": ("all-to-all", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
}
# symm_mem operator -> (our word for its collective, position of the group's name)
_FUSED = {"fused_all_gather_matmul": ("all-gather", 3), "fused_matmul_reduce_scatter": ("reduce-scatter", 4)}


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Event:
    """One collective as torch.distributed saw it.

    axis: the mesh axis whose group it ran on (the group's description where no mesh names it).
    bytes: what this rank sends, by the convention of `shardgrad.layout.cost`.
    """

    operation: str
    axis: str
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    ranks: int


class Trace:
    """The events of a traced block, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @property
    def bytes(self) -> int:
        """Bytes that this rank sent in all."""
        return sum(event.bytes for event in self.events)

    def totals(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Count and bytes by (operation, axis)."""
        return totals(self.events)

    def __str__(self) -> str:
        lines = [
            f"{event.operation} over {event.axis}: {event.dtype} {list(event.shape)}, {event.bytes:,} bytes sent"
            for event in self.events
        ]
        return "\n".join(lines) or "no collectives"

    def __repr__(self) -> str:
        many = "" if len(self.events) == 1 else "s"
        return f"Trace({len(self.events)} collective{many}, {self.bytes:,} bytes sent by this rank)"

    def __len__(self) -> int:
        return len(self.events)

    def __getitem__(self, at: int) -> Event:
        return self.events[at]

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)


_paused: list[_Listener] = []


def traced_op(operator: Callable[P, R]) -> Callable[P, R]:
    """Let traces listen to what runs inside one of shardgrad's own operators, which torch shows them as a whole."""

    @functools.wraps(operator)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for listener in reversed(_paused[:]):
                stack.enter_context(listener)
            return operator(*args, **kwargs)

    return call


class _Listener(shim.TorchDispatchMode):
    supports_higher_order_operators = True  # in compiled graphs: those that keep shardgrad's operators in order

    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func.name().removeprefix("c10d::"), args)
        elif func.namespace == "symm_mem":
            self._note_fused(func.name().removeprefix("symm_mem::"), args)
        if func.namespace not in ("shardgrad", "higher_order"):
            return func(*args, **(kwargs or {}))
        _paused.append(self)  # as torch does with a mode while it handles an operator
        try:
            return func(*args, **(kwargs or {}))
        finally:
            _paused.remove(self)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether compiled code may run as such under this mode: operators of c10d are what they were."""
        return True

    def _note(self, operator: str, args: Any) -> None:
        if operator not in _OPERATORS:
            return  # barriers and receives send nothing
        operation, at = _OPERATORS[operator]
        group = next(g for g in map(shim.process_group, args) if g is not None)
        tensors = list(_tensors(args[at]))
        if not tensors:
            return
        elements = sum(t.numel() for t in tensors)
        if operation == "all-to-all":
            count = elements - _own_part(operator, args, tensors, group.rank(), group.size())
        else:
            count = elements if operation == "send" else sent(operation, elements, group.size(), group.rank())
        self._add(operation, group, count, tuple(tensors[0].shape), tensors[0])

    def _note_fused(self, operator: str, args: Any) -> None:
        """A product with its collective, over symmetric memory."""
        if operator not in _FUSED:
            return
        operation, at = _FUSED[operator]
        group, x = shim.group_named(args[at]), args[0]
        shape = tuple(x.shape) if operation == "all-gather" else (*x.shape[:-1], args[1].shape[1])
        self._add(operation, group, sent(operation, prod(shape), group.size(), group.rank()), shape, x)

    def _add(self, operation: str, group: Any, count: int, shape: tuple[int, ...], like: Tensor) -> None:
        dtype, size = str(like.dtype).removeprefix("torch."), like.element_size()
        self.events.append(Event(operation, axis_name(group), count * size, shape, dtype, group.size()))


def _own_part(operator: str, args: Any, tensors: list[Tensor], rank: int, ranks: int) -> int:
    """Elements of an all-to-all that a rank gives to itself: its own tensor of a list, or its own rows."""
    if operator == "alltoall_":
        return tensors[rank].numel()
    x, splits = tensors[0], args[4]
    return splits[rank] * (x.numel() // max(x.shape[0], 1)) if splits else x.numel() // ranks


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _tensors(part)


@contextmanager
def trace_collectives() -> Iterator[Trace]:
    """Record the collectives that this process starts inside the block, in forward and in backward.

    It listens to PyTorch's dispatcher, not to shardgrad's plan, so it can contradict a prediction, and sees what DDP,
    `fully_shard`, an optimizer or your own calls of torch.distributed send. It does not see functional collectives
    (`torch.distributed._functional_collectives`), through which DTensor redistributes; nor receives and barriers.
    """
    record = Trace()
    with _Listener(record.events):
        yield record
