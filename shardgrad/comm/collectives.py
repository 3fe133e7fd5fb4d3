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
from shardgrad.comm.failure_report import failure_report
from shardgrad.comm.mesh import Axis
from shardgrad.comm.shim import dispatch_mode_active
from shardgrad.comm.shm.register import register
from shardgrad.errors import CollectiveError, ShapeError
from shardgrad.layout.sizes import chunk

register()


class Pending:
    """A collective under way. `wait` returns its result, or says which one failed."""

    __slots__ = ("_finish",)

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish

    def wait(self) -> Tensor:
        return self._finish()


Sent = tuple[Any, Tensor, Tensor, int]  # work, what comes, what went (it must outlive the work), how much to keep


class CommTimer:
    """Seconds that this process spent starting collectives and blocked on them, and how many there were.

    On CUDA a wait only orders streams, so this is host time there.

    named: whether torch.profiler is told what is started and what is waited for, as "start all-reduce of dX over tp".
    """

    def __init__(self, named: bool = False) -> None:
        self.seconds = 0.0
        self.count = 0
        self.named = named


_clocks: list[CommTimer] = []

# A gloo thread lets go of a collective's tensors a little after `wait` has returned, and needs the interpreter lock for
# it. If the interpreter ends first, the thread takes the process down ("terminate called without an active exception"),
# measured on two busy cores in 3 of 14 runs of a program that ends right after a backward; with this, in none of 14.
atexit.register(time.sleep, 0.05)


@contextmanager
def comm_timer(named: bool = False) -> Iterator[CommTimer]:
    """Measure the time this process spends in communication inside the block, backward included.

    named: also tell torch.profiler what is started and what is waited for.
    """
    clock = CommTimer(named)
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
        f"rank {axis.ranks[axis.index]}: {what} over {axis} failed: {str(error).strip()}\n"
        f"{failure_report(what, axis)}"
        "A rank that died, that raised before this operation, or that came here with another layout or shape leaves "
        "the others waiting; run the block under sg.check_every_call() to compare layouts and shapes at every call."
    )


class _Ready:
    """A collective over an axis, made ready: what is asked of the process group at every call is settled once.

    direct, via_dispatcher: the call of what the group calls, and of the group itself, through torch's dispatcher.
    """

    __slots__ = ("_axis", "_direct", "_via_dispatcher", "_what")

    def __init__(self, axis: Axis, what: str, direct: Callable[..., Any], via_dispatcher: Callable[..., Any]) -> None:
        self._axis, self._what = axis, what
        self._direct, self._via_dispatcher = direct, via_dispatcher

    def _begin(self, x: Tensor, *arguments: Any) -> Any:
        """Begin; what is returned is to be waited for, if it is not None.

        x: one of the tensors. The dispatcher costs more than all the rest: it is for who listens there, and for tensors
        whose memory does not hold their values as they are.
        """
        odd = type(x) is not Tensor or x.is_neg() or x.is_conj()
        call = self._via_dispatcher if odd or dispatch_mode_active() else self._direct
        if _clocks:
            return _start(lambda: call(*arguments), self._what, self._axis)
        try:
            return call(*arguments)
        except (RuntimeError, ValueError) as error:
            raise CollectiveError(_failure(error, self._what, self._axis)) from error

    def wait(self, work: Any) -> None:
        """Wait for what was begun."""
        if work is None:
            return
        if _clocks:
            _timed(work.wait, self._what, self._axis)
            return
        try:
            work.wait()
        except (RuntimeError, ValueError) as error:
            raise CollectiveError(_failure(error, self._what, self._axis)) from error


class AllGather(_Ready):
    """The shards of a tensor along `dim` concatenated, `global_size` over all ranks (cut as torch.chunk cuts)."""

    __slots__ = ("_dim", "_global_size", "_options", "_padded_size")

    def __init__(self, axis: Axis, dim: int, global_size: int, what: str = "all-gather") -> None:
        super().__init__(axis, what, shim.all_gather_of(axis.backend), shim.all_gather_of(axis.group))
        self._dim, self._global_size, self._padded_size = dim, global_size, -(-global_size // axis.size)
        self._options = shim.AllgatherOptions()
        self._options.asyncOp = True

    def start(self, x: Tensor) -> Sent:
        """Begin; what is returned is for `finish`."""
        x = _padded(x, self._dim, self._padded_size).contiguous()
        # Results are tensors of their own, not views: those could not be changed in place by who gets them.
        gathered = x.new_empty((self._axis.size * x.shape[0], *x.shape[1:]))
        work = self._begin(x, _real(gathered), _real(x), self._options) if gathered.numel() else None
        return work, gathered, x, 0

    def finish(self, sent: Sent) -> Tensor:
        """The whole tensor."""
        work, gathered, x, _ = sent
        self.wait(work)
        if self._dim == 0:
            return gathered if gathered.shape[0] == self._global_size else gathered[: self._global_size].clone()
        blocks = gathered.unflatten(0, (self._axis.size, x.shape[0])).unbind()
        lengths = (chunk(self._global_size, self._axis.size, i)[1] for i in range(self._axis.size))
        return torch.cat([block.narrow(self._dim, 0, length) for block, length in zip(blocks, lengths)], self._dim)


class ReduceScatter(_Ready):
    """The sum of a tensor over the ranks, of which each keeps its chunk along `dim`."""

    __slots__ = ("_dim", "_options")

    def __init__(self, axis: Axis, dim: int, what: str = "reduce-scatter") -> None:
        super().__init__(axis, what, shim.reduce_scatter_of(axis.backend), shim.reduce_scatter_of(axis.group))
        self._dim = dim
        self._options = dist.ReduceScatterOptions()  # by default a sum
        self._options.asyncOp = True

    def start(self, x: Tensor) -> Sent:
        """Begin; what is returned is for `finish`."""
        dim, axis = self._dim, self._axis
        size = x.shape[dim]
        padded_size = -(-size // axis.size)
        x = _padded(x, dim, padded_size * axis.size)
        if dim:
            x = x.unflatten(dim, (axis.size, padded_size)).movedim(dim, 0)
        x = x.contiguous()
        block = x.new_empty(x.shape[1:] if dim else (padded_size, *x.shape[1:]))
        work = None
        if block.numel():
            flat = (block.view(-1), x.view(-1)) if dim else (block, x)  # gloo compares the first dims
            work = self._begin(x, *map(_real, flat), self._options)
        return work, block, x, chunk(size, axis.size, axis.index)[1]

    def finish(self, sent: Sent) -> Tensor:
        """This rank's chunk."""
        work, block, _, own = sent
        self.wait(work)
        return block if own == block.shape[self._dim] else block.narrow(self._dim, 0, own).clone()


class AllReduce(_Ready):
    """A sum over an axis, of tensors that are contiguous, in place."""

    __slots__ = ("_at_once", "_later")

    def __init__(self, axis: Axis, what: str = "all-reduce", op: Any = dist.ReduceOp.SUM) -> None:
        own = getattr(axis.backend, "all_reducer", None)  # shared memory has a cheaper way
        super().__init__(axis, what, own(op).start if own else axis.backend.allreduce, axis.group.allreduce)
        self._at_once, self._later = dist.AllreduceOptions(), dist.AllreduceOptions()
        for options in (self._at_once, self._later):
            options.reduceOp = op
        self._at_once.asyncOp, self._later.asyncOp = False, True

    def sum(self, x: Tensor) -> None:
        """Sum `x`."""
        self.wait(self._begin(x, [x], self._at_once) if x.numel() else None)

    def start(self, x: Tensor) -> Any:
        """Start to sum `x`; what is returned is to be waited for."""
        return self._begin(x, [x], self._later) if x.numel() else None


def all_gather(x: Tensor, axis: Axis, dim: int, global_size: int, what: str = "all-gather") -> Pending:
    """Concatenate the shards of `x` along `dim`, over all ranks of `global_size` (cut as torch.chunk cuts)."""
    return begin(AllGather(axis, dim, global_size, what), x)


def reduce_scatter(x: Tensor, axis: Axis, dim: int, what: str = "reduce-scatter") -> Pending:
    """Sum `x` over the ranks and keep this rank's chunk along `dim`."""
    return begin(ReduceScatter(axis, dim, what), x)


def all_reduce(x: Tensor, axis: Axis, what: str = "all-reduce", op: Any = dist.ReduceOp.SUM) -> Pending:
    """Sum `x` over the ranks. `x` is overwritten if it is contiguous: hand over a tensor of your own."""
    return begin(AllReduce(axis, what, op), x)


Ready = AllGather | ReduceScatter | AllReduce


def begin(ready: Ready, x: Tensor) -> Pending:
    """Start a collective that was made ready. An all-reduce overwrites `x` if it is contiguous."""
    if isinstance(ready, AllReduce):
        own = x.contiguous()
        work = ready.start(own)

        def finish() -> Tensor:
            ready.wait(work)
            return own

        return Pending(finish)
    sent = ready.start(x)
    return Pending(lambda: ready.finish(sent))


def _real(x: Tensor) -> Tensor:
    """As torch.distributed hands complex tensors to a process group."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def all_to_all(x: Tensor, axis: Axis, split: int, concat: int, global_size: int, what: str = "all-to-all") -> Pending:
    """Give each rank its chunk along `split`; concatenate what comes along `concat`, in all of `global_size`."""
    padded_split = -(-x.shape[split] // axis.size)
    padded_size = -(-global_size // axis.size)
    mine = chunk(x.shape[split], axis.size, axis.index)[1]
    x = _padded(_padded(x, split, padded_split * axis.size), concat, padded_size)
    out = x.unflatten(split, (axis.size, padded_split)).movedim(split, 0).contiguous()
    received = torch.empty_like(out)
    work = None

    def finish(_: Tensor = out) -> Tensor:  # which must outlive the work
        if work is not None:
            _timed(work.wait, what, axis)
        full = received.movedim(0, concat).flatten(concat, concat + 1)
        return full.narrow(concat, 0, global_size).narrow(split, 0, mine)

    if out.numel():
        work = _start(
            lambda: dist.all_to_all_single(received.view(-1), out.view(-1), group=axis.group, async_op=True), what, axis
        )
    return Pending(finish)


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

    def finish(_: Tensor = x) -> Tensor:  # which must outlive the work
        _timed(work.wait, what, axis)
        return received

    return Pending(finish)


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
