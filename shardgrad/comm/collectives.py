"""The collectives over one mesh axis, along any dim, uneven shards included. Not differentiable.

Each is an object that is built once and called often: `start(x)` begins and returns a handle, `wait(handle)` returns
the result, and a call does both. Only this file and `all_to_all` have torch.distributed move data.

| collective      | input on a rank                  | result on a rank                                    |
| --------------- | -------------------------------- | --------------------------------------------------- |
| `AllGather`     | its shard of a dim               | the whole dim                                       |
| `ReduceScatter` | one term of a sum                | its chunk, along a dim, of the sum                  |
| `AllReduce`     | one term of a sum                | the sum, in place                                   |
| `AllToAllRows`  | rows, by the rank they go to     | rows, by the rank they come from                    |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.comparison import SLICE_S
from shardgrad.comm.failure_report import failure, hopeless
from shardgrad.comm.first_derivatives import refuse_transforms
from shardgrad.comm.mesh import Axis
from shardgrad.comm.process_end import end_at_exit, pause_at_exit
from shardgrad.comm.shim import dispatch_mode_active
from shardgrad.comm.shm.register import register
from shardgrad.comm.timer import timed, timers
from shardgrad.errors import ShapeError
from shardgrad.layout.sizes import Balanced, chunk, chunks, rule

register()

_SLICE = timedelta(seconds=SLICE_S)

Handle = Any
"""What `start` returns, for `wait` alone. It holds every tensor that must outlive the collective."""


class Collective:
    """A collective over an axis: what can be known before a tensor comes is resolved when it is built.

    axis, what: where it runs, and what errors call it.
    direct, via_dispatcher: the call of the backend itself, and of the group, through PyTorch's dispatcher.
    """

    __slots__ = ("_direct", "_in_slices", "_standing", "_via_dispatcher", "axis", "what")

    def __init__(self, axis: Axis, what: str, direct: Callable[..., Any], via_dispatcher: Callable[..., Any]) -> None:
        self.axis, self.what, self._standing = axis, what, axis.standing
        self._in_slices = shim.waits_in_slices(axis.backend)
        if self._in_slices:
            pause_at_exit()
        elif look_further := getattr(axis.backend, "look_further", None):  # shared memory waits by itself
            look_further(lambda doing: str(hopeless(doing, axis) or ""))
        self._direct, self._via_dispatcher = direct, via_dispatcher

    def __call__(self, x: Tensor) -> Tensor:
        """The result for `x`."""
        return self.wait(self.start(x))

    def start(self, x: Tensor) -> Handle:
        """Begin; what is returned is for `wait`."""
        raise NotImplementedError

    def wait(self, handle: Handle) -> Tensor:
        """The result of what was begun.

        Raises:
            CollectiveError: it failed, or timed out.
        """
        raise NotImplementedError

    def _begin(self, x: Tensor, *arguments: Any) -> Any:
        """Begin; what is returned is to be awaited, if it is not None.

        x: one of the tensors. The dispatcher costs more than all the rest: it is for modes that listen there, and for
        tensors whose memory does not hold their values as they are.
        """
        if shim.beyond_backward() and shim.is_transformed(x):
            refuse_transforms(f"{self.what} over {self.axis.name}")
        odd = type(x) is not Tensor or x.is_neg() or x.is_conj()
        call = self._via_dispatcher if odd or dispatch_mode_active() else self._direct
        self._standing.begun += 1
        try:
            if timers:
                label = f"{self.what} over {self.axis.name}"
                return timed(lambda: call(*arguments), label, starts=True, backend=self.axis.backend)
            return call(*arguments)
        except (RuntimeError, ValueError) as error:
            raise failure(self.what, self.axis, error) from error

    def _await(self, work: Any) -> None:
        try:
            if timers:
                label = f"{self.what} over {self.axis.name}"
                in_vain = timed(lambda: self._wait(work), label, starts=False, backend=self.axis.backend)
            elif self._in_slices:
                in_vain = self._wait(work)
            else:
                work.wait()
                return
        except (RuntimeError, ValueError) as error:
            raise failure(self.what, self.axis, error) from error
        if in_vain is not None:
            raise in_vain

    def _wait(self, work: Any) -> Exception | None:
        """Wait for it, or return why that is in vain."""
        while self._in_slices:
            try:
                work.wait(_SLICE)
                return None
            except RuntimeError:
                if work.is_completed():
                    break  # it has failed, or ended just now: `wait` says which
            if error := hopeless(self.what, self.axis):
                end_at_exit(work)
                return error
        work.wait()
        return None


class AllGather(Collective):
    """The shards of a tensor along `dim` concatenated: `global_size` over all ranks, as the axis shards it."""

    __slots__ = ("_dim", "_lengths", "_missing", "_options", "_size")

    def __init__(self, axis: Axis, dim: int, global_size: int, what: str = "all-gather") -> None:
        super().__init__(axis, what, shim.all_gather_of(axis.backend), shim.all_gather_of(axis.group))
        self._dim, self._size = dim, global_size
        self._lengths = chunks(global_size, axis.size)
        self._missing = self._lengths[0] - self._lengths[axis.index]
        self._options = shim.AllgatherOptions()
        self._options.asyncOp = True

    def start(self, x: Tensor) -> Handle:
        if self._missing:
            x = padded(x, self._dim, self._missing)
        if not x.is_contiguous():
            x = x.contiguous()
        # Results are tensors of their own, not views: a caller could not change those in place.
        gathered = x.new_empty((self.axis.size * x.shape[0], *x.shape[1:]))
        if not gathered.numel():
            return None, gathered, x
        if x.is_complex():
            return self._begin(x, _real(gathered), _real(x), self._options), gathered, x
        return self._begin(x, gathered, x, self._options), gathered, x

    def wait(self, handle: Handle) -> Tensor:
        work, gathered, x = handle
        if work is not None:
            self._await(work)
        if self._dim == 0:
            whole: Tensor = gathered
            if whole.shape[0] == self._size:
                return whole
            if not isinstance(self.axis.size, Balanced):  # all that is padded is at the end
                return whole[: self._size].clone()
        return from_blocks(gathered.unflatten(0, (self.axis.size, x.shape[0])), self._dim, self._lengths)


class ReduceScatter(Collective):
    """The sum of a tensor over the ranks, of which each keeps its chunk along `dim`."""

    __slots__ = ("_dim", "_options")

    def __init__(self, axis: Axis, dim: int, what: str = "reduce-scatter") -> None:
        super().__init__(axis, what, shim.reduce_scatter_of(axis.backend), shim.reduce_scatter_of(axis.group))
        self._dim = dim
        self._options = dist.ReduceScatterOptions()  # by default a sum
        self._options.asyncOp = True

    def start(self, x: Tensor) -> Handle:
        dim, ranks, size = self._dim, self.axis.size, x.shape[self._dim]
        padded_size = -(-size // ranks)
        if padded_size * ranks != size:
            x = in_blocks(x, dim, ranks).flatten(dim, dim + 1)
        if dim:
            x = x.unflatten(dim, (ranks, padded_size)).movedim(dim, 0)
        if not x.is_contiguous():
            x = x.contiguous()
        block = x.new_empty(x.shape[1:] if dim else (padded_size, *x.shape[1:]))
        work = None
        if block.numel():
            flat = (block.view(-1), x.view(-1)) if dim else (block, x)  # gloo compares the first dims
            if x.is_complex():
                flat = _real(flat[0]), _real(flat[1])
            work = self._begin(x, *flat, self._options)
        own = padded_size if padded_size * ranks == size else chunk(size, ranks, self.axis.index)[1]
        return work, block, x, own

    def wait(self, handle: Handle) -> Tensor:
        work, block, _, own = handle
        if work is not None:
            self._await(work)
        return block if own == block.shape[self._dim] else block.narrow(self._dim, 0, own).clone()


class AllReduce(Collective):
    """A reduction over an axis, in place. A tensor that is not contiguous is copied, and the copy returned.

    op: torch's; a sum by default.
    """

    __slots__ = ("_blocking", "_options")

    def __init__(self, axis: Axis, what: str = "all-reduce", op: Any = dist.ReduceOp.SUM) -> None:
        own = getattr(axis.backend, "all_reducer", None)  # shared memory has a cheaper way
        super().__init__(axis, what, own(op).start if own else axis.backend.allreduce, axis.group.allreduce)
        self._blocking, self._options = dist.AllreduceOptions(), dist.AllreduceOptions()
        for options in (self._blocking, self._options):
            options.reduceOp = op
        self._blocking.asyncOp, self._options.asyncOp = False, True

    def __call__(self, x: Tensor) -> Tensor:
        """The reduced `x`."""
        if not x.is_contiguous():
            x = x.contiguous()
        work = self._begin(x, [x], self._blocking) if x.numel() else None
        if work is not None:
            self._await(work)
        return x

    def start(self, x: Tensor) -> Handle:
        if not x.is_contiguous():
            x = x.contiguous()
        return self._begin(x, [x], self._options) if x.numel() else None, x

    def wait(self, handle: Handle) -> Tensor:
        work, x = handle
        if work is not None:
            self._await(work)
        return x


class AllToAllRows(Collective):
    """The next `send[i]` rows (dim 0) to rank i; what comes, `receive[i]` rows of rank i, concatenated.

    Every rank of the axis takes part, also one that neither sends nor receives.
    """

    __slots__ = ("_receive", "_send")

    def __init__(
        self, axis: Axis, send: Sequence[int], receive: Sequence[int], what: str = "all-to-all of rows"
    ) -> None:
        super().__init__(axis, what, dist.all_to_all_single, dist.all_to_all_single)
        self._send, self._receive = list(send), list(receive)

    def start(self, x: Tensor) -> Handle:
        x = x.contiguous()
        received = x.new_empty((sum(self._receive), *x.shape[1:]))
        return self._begin(x, received, x, self._receive, self._send, self.axis.group, True), received, x

    def wait(self, handle: Handle) -> Tensor:
        work, received, _ = handle
        self._await(work)
        whole: Tensor = received
        return whole


def keep_chunk(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's chunk of `x` along `dim`, as a view: no communication."""
    start, length = chunk(x.shape[dim], axis.size, axis.index)
    return x.narrow(dim, start, length)


def gather_ints(values: list[int], axis: Axis, device: torch.device, what: str) -> list[list[int]]:
    """Every rank's integers (as many on each), in the order of the axis."""
    with shim.real_tensors():
        # All-to-all, so that a rank that is elsewhere cannot take these for the data of an all-gather, or the reverse.
        mine = torch.tensor([values] * axis.size, dtype=torch.int64, device=device)
        exchange = AllToAllRows(axis, [1] * axis.size, [1] * axis.size, what)
        found: list[list[int]] = exchange(mine).tolist()
        return found


def whole_size(parts: Sequence[int], axis: Axis, what: str) -> int:
    """The size of a dim over all ranks, from the parts of it that the ranks of an axis hold.

    Raises:
        ShapeError: they are not as the axis shards.
    """
    size = sum(parts)
    right = chunks(size, axis.size)
    if list(parts) != right:
        raise ShapeError(
            f"the shards of {what} over {axis} have sizes {list(parts)}, but {size} is sharded as {right} "
            f"({rule(axis.size)}): shard tensors with sg.shard(full, layout[name], mesh)"
        )
    return size


def padded(x: Tensor, dim: int, missing: int) -> Tensor:
    """`x` with so many zeros behind it along `dim`."""
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim)


def in_blocks(x: Tensor, dim: int, ranks: int) -> Tensor:
    """The chunks of `dim` as blocks of the longest one's size, zeros behind the others: [..., size, ...] → [..., ranks,
    longest, ...]."""
    size = x.shape[dim]
    longest, longer = -(-size // ranks), size % ranks
    if longer and isinstance(ranks, Balanced):
        first, others = x.split([longer * longest, size - longer * longest], dim)
        others = padded(others.unflatten(dim, (ranks - longer, longest - 1)), dim + 1, 1)
        return torch.cat((first.unflatten(dim, (longer, longest)), others), dim)
    return padded(x, dim, longest * ranks - size).unflatten(dim, (int(ranks), longest))


def from_blocks(blocks: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
    """A tensor from the blocks of its chunks: [ranks, ..., longest, ...] → [..., size, ...]. dim: of the tensor."""
    parts = list(blocks.unbind())
    if lengths[-1] != lengths[0]:
        parts = [part.narrow(dim, 0, length) for part, length in zip(parts, lengths)]
    return torch.cat(parts, dim)


def _real(x: Tensor) -> Tensor:
    """As torch.distributed hands complex tensors to a process group."""
    return torch.view_as_real(x.resolve_conj())
