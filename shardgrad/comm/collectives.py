"""The raw collectives, started and waited for: uneven shards along any dim, over one mesh axis. Not differentiable.

The only file that calls torch.distributed to move data.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from shardgrad.comm import shim
from shardgrad.comm.mesh import Axis
from shardgrad.comm.rollcall import roll_call
from shardgrad.comm.shim import dispatch_is_listened_to
from shardgrad.comm.shm.register import register
from shardgrad.errors import CollectiveError, ShapeError
from shardgrad.layout.sizes import chunk

register()


class Pending:
    """A collective under way. `wait` returns its result, or says which one failed."""

    __slots__ = ("_axis", "_finish", "_keep", "_what", "_work")

    def __init__(self, work: Any, finish: Callable[[], Tensor], what: str, axis: Axis, keep: Any = None) -> None:
        self._work, self._finish, self._what, self._axis = work, finish, what, axis
        self._keep = keep  # inputs must outlive an asynchronous collective

    def wait(self) -> Tensor:
        if self._work is not None:
            _timed(self._work.wait, self._what, self._axis)
        return self._finish()


class Clock:
    """Seconds that this process spent starting collectives and blocked on them, and how many there were.

    On CUDA a wait only orders streams, so this is host time there.

    named: whether torch.profiler is told what is started and what is waited for, as "start all-reduce of dX over tp".
    """

    def __init__(self, named: bool = False) -> None:
        self.seconds = 0.0
        self.count = 0
        self.named = named


_clocks: list[Clock] = []

# A gloo thread lets go of a collective's tensors a little after `wait` has returned, and needs the interpreter lock for
# it. If the interpreter ends first, the thread takes the process down ("terminate called without an active exception"),
# measured on two busy cores in 3 of 14 runs of a program that ends right after a backward; with this, in none of 14.
atexit.register(time.sleep, 0.05)


@contextmanager
def communication_clock(named: bool = False) -> Iterator[Clock]:
    """Measure the time this process spends in communication inside the block, backward included.

    named: also tell torch.profiler what is started and what is waited for.
    """
    clock = Clock(named)
    _clocks.append(clock)
    try:
        yield clock
    finally:
        _clocks.remove(clock)


def _timed(call: Callable[[], Any], what: str, axis: Axis, doing: str = "wait for") -> Any:
    start = time.perf_counter() if _clocks else 0.0
    try:
        if _clocks and any(clock.named for clock in _clocks):
            with record_function(f"{doing} {what} over {axis.name}"):
                result = call()
        else:
            result = call()
    except (RuntimeError, ValueError) as error:
        raise CollectiveError(_failure(error, what, axis)) from error
    if _clocks:
        for clock in _clocks:
            clock.seconds += time.perf_counter() - start
    return result


def _start(call: Callable[[], Any], what: str, axis: Axis) -> Any:
    for clock in _clocks:
        clock.count += 1
    return _timed(call, what, axis, "start")


def _failure(error: BaseException, what: str, axis: Axis) -> str:
    return (
        f"rank {dist.get_rank()}: {what} over {axis} failed: {str(error).strip()}\n"
        f"{roll_call(what, axis)}"
        "A rank that died, that raised before this operation, or that came here with another layout or shape leaves "
        "the others waiting; run the block under sg.check_every_call() to compare layouts and shapes at every call."
    )


def all_gather(x: Tensor, axis: Axis, dim: int, whole: int, what: str = "all-gather") -> Pending:
    """Concatenate the shards of `x` along `dim`, whose size over all ranks is `whole` (cut as torch.chunk cuts)."""
    most = -(-whole // axis.size)
    shape = list(x.shape)
    shape[dim] = most
    x = _padded(x, dim, most).contiguous()
    # Results are tensors of their own, not views: those could not be changed in place by who gets them.
    gathered = x.new_empty((axis.size * shape[0], *shape[1:]))

    def finish() -> Tensor:
        if dim == 0:
            return gathered if axis.size * most == whole else gathered[:whole].clone()
        blocks = gathered.unflatten(0, (axis.size, shape[0])).unbind()
        lengths = (chunk(whole, axis.size, i)[1] for i in range(axis.size))
        return torch.cat([block.narrow(dim, 0, length) for block, length in zip(blocks, lengths)], dim)

    if gathered.numel() == 0:
        return Pending(None, finish, what, axis)
    work = _start(
        lambda: shim.all_gather_single(gathered.view(-1), x.view(-1), group=axis.group, async_op=True), what, axis
    )
    return Pending(work, finish, what, axis, keep=x)


def reduce_scatter(x: Tensor, axis: Axis, dim: int, what: str = "reduce-scatter") -> Pending:
    """Sum `x` over the ranks and keep this rank's chunk along `dim`."""
    size = x.shape[dim]
    most = -(-size // axis.size)
    x = _padded(x, dim, most * axis.size)
    if dim:
        x = x.unflatten(dim, (axis.size, most)).movedim(dim, 0)
    x = x.contiguous()
    shape = (*x.shape[1:],) if dim else (most, *x.shape[1:])
    block = x.new_empty(shape)

    def finish() -> Tensor:
        own = chunk(size, axis.size, axis.index)[1]
        return block if own == most else block.narrow(dim, 0, own).clone()

    if block.numel() == 0:
        return Pending(None, finish, what, axis)
    work = _start(
        lambda: shim.reduce_scatter_single(block.view(-1), x.view(-1), group=axis.group, async_op=True), what, axis
    )
    return Pending(work, finish, what, axis, keep=x)


class AllReduce:
    """A sum over an axis, made ready: what is asked of the process group at every call is settled once."""

    __slots__ = ("_awaited", "_axis", "_begin", "_begin_told", "_begun", "_options", "_what")

    def __init__(self, axis: Axis, what: str = "all-reduce", op: Any = dist.ReduceOp.SUM) -> None:
        self._axis, self._what = axis, what
        awaited, begun = dist.AllreduceOptions(), dist.AllreduceOptions()
        for options in (awaited, begun):
            options.reduceOp = op
        awaited.asyncOp, begun.asyncOp = False, True
        self._begin_told, self._options = axis.group.allreduce, (begun, awaited)
        # Straight to what the group calls: torch's dispatcher costs more than all the rest. Shared memory knows all
        # that the options say.
        own = getattr(axis.backend, "all_reducer", None)
        self._begin: Any = axis.backend.allreduce if own is None else own(op).start
        self._begun: Any = begun if own is None else False
        self._awaited: Any = awaited if own is None else True

    def sum(self, x: Tensor) -> None:
        """Sum a contiguous `x` in place."""
        if _clocks or dispatch_is_listened_to() or type(x) is not Tensor:
            return self.wait(self._start(x, True))
        try:
            work = self._begin([x], self._awaited) if x.numel() else None
            if work is not None:
                work.wait()
        except (RuntimeError, ValueError) as error:
            raise CollectiveError(_failure(error, self._what, self._axis)) from error

    def start(self, x: Tensor) -> Any:
        """Start to sum a contiguous `x` in place; what is returned is to be waited for."""
        if _clocks or dispatch_is_listened_to() or type(x) is not Tensor:
            return self._start(x, False)
        try:
            return self._begin([x], self._begun) if x.numel() else None
        except (RuntimeError, ValueError) as error:
            raise CollectiveError(_failure(error, self._what, self._axis)) from error

    def _start(self, x: Tensor, awaited: bool) -> Any:
        """Through the dispatcher, for who listens there, and by the clocks."""
        if x.numel() == 0:
            return None
        return _start(lambda: self._begin_told([x], self._options[awaited]), self._what, self._axis)

    def wait(self, work: Any) -> None:
        """Wait for what `start` returned; then the sum is there."""
        if work is None:
            return
        if _clocks:
            _timed(work.wait, self._what, self._axis)
            return
        try:
            work.wait()
        except (RuntimeError, ValueError) as error:
            raise CollectiveError(_failure(error, self._what, self._axis)) from error


def all_reduce(x: Tensor, axis: Axis, what: str = "all-reduce", op: Any = dist.ReduceOp.SUM) -> Pending:
    """Sum `x` over the ranks. `x` is overwritten if it is contiguous: hand over a tensor of your own."""
    own = x.contiguous()
    return Pending(AllReduce(axis, what, op).start(own), lambda: own, what, axis)


def all_to_all(x: Tensor, axis: Axis, split: int, concat: int, whole: int, what: str = "all-to-all") -> Pending:
    """Give each rank its chunk along `split`; concatenate what comes along `concat`, whose total size is `whole`."""
    most_split = -(-x.shape[split] // axis.size)
    most = -(-whole // axis.size)
    mine = chunk(x.shape[split], axis.size, axis.index)[1]
    x = _padded(_padded(x, split, most_split * axis.size), concat, most)
    out = x.unflatten(split, (axis.size, most_split)).movedim(split, 0).contiguous()
    received = torch.empty_like(out)

    def finish() -> Tensor:
        full = received.movedim(0, concat).flatten(concat, concat + 1)
        return full.narrow(concat, 0, whole).narrow(split, 0, mine)

    if out.numel() == 0:
        return Pending(None, finish, what, axis)
    work = _start(
        lambda: dist.all_to_all_single(received.view(-1), out.view(-1), group=axis.group, async_op=True), what, axis
    )
    return Pending(work, finish, what, axis, keep=out)


def all_to_all_rows(
    x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int], what: str = "all-to-all of rows"
) -> Pending:
    """Give rank i the next `send[i]` rows (dim 0) of `x`; what comes, `receive[i]` rows of rank i, is concatenated.

    Every rank of the axis takes part, also one that neither sends nor receives.
    """
    x = x.contiguous()
    received = x.new_empty((sum(receive), *x.shape[1:]))
    work = _start(
        lambda: dist.all_to_all_single(received, x, list(receive), list(send), group=axis.group, async_op=True),
        what,
        axis,
    )
    return Pending(work, lambda: received, what, axis, keep=x)


def cut(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's chunk of `x` along `dim`, as a view: no communication."""
    start, length = chunk(x.shape[dim], axis.size, axis.index)
    return x.narrow(dim, start, length)


def gather_ints(values: list[int], axis: Axis, device: torch.device, what: str) -> list[list[int]]:
    """Every rank's integers (as many on each), in the order of the axis."""
    with shim.real_tensors():
        mine = torch.tensor([values] * axis.size, dtype=torch.int64, device=device)
        everyones = torch.empty_like(mine)
        # All-to-all, so that a rank that is elsewhere cannot take these for the data of an all-gather, or the reverse.
        work = _start(
            lambda: dist.all_to_all_single(everyones.view(-1), mine.view(-1), group=axis.group, async_op=True),
            what,
            axis,
        )
        _timed(work.wait, what, axis)
        return everyones.tolist()


def whole_size(parts: Sequence[int], axis: Axis, what: str) -> int:
    """The size of a dim over all ranks, from the parts of it that the ranks of an axis hold.

    Raises:
        ShapeError: they are not cut as torch.chunk cuts.
    """
    size = sum(parts)
    right = [chunk(size, axis.size, i)[1] for i in range(axis.size)]
    if list(parts) != right:
        raise ShapeError(
            f"the shards of {what} over {axis} have sizes {list(parts)}, but {size} is cut as {right} (torch.chunk): "
            "cut tensors with sg.shard(full, layout[name], mesh)"
        )
    return size


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim)
