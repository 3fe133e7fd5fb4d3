"""Torch's names for it: the process group that `init_process_group("shm")` makes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.shm import collectives as c
from shardgrad.comm.shm.all_reducer import AllReducer
from shardgrad.comm.shm.arguments import (
    as_bytes,
    check_count,
    check_dtype,
    check_numel,
    equal_parts,
    one_or_all,
    parts_of,
)
from shardgrad.comm.shm.errors import ShmError
from shardgrad.comm.shm.fork import guard
from shardgrad.comm.shm.mailbox import Mailbox
from shardgrad.comm.shm.pairs import ANY
from shardgrad.comm.shm.platform import unsupported
from shardgrad.comm.shm.progress import progress
from shardgrad.comm.shm.queue import Queue, Ticket
from shardgrad.comm.shm.rendezvous import rendezvous
from shardgrad.comm.shm.tensors import dtype_name, flat_input, flat_output, words
from shardgrad.comm.shm.work import ShmWork


def _via_dispatcher(method: Callable[..., ShmWork]) -> Callable[..., ShmWork]:
    """Show the call to PyTorch's dispatcher, if a mode listens there (`sg.trace_collectives`, CommDebugMode), and
    hide from it the copies and sums that the call is made of, as other backends do."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: ShmGroup, *args: Any, **kwargs: Any) -> ShmWork:
        if not shim.dispatch_mode_active():
            return method(self, *args, **kwargs)
        shim.call_shadow(self, name, *args, **kwargs)
        with shim.no_dispatch():
            return method(self, *args, **kwargs)

    return shim.untraced(call)


class ShmGroup(dist.ProcessGroup):
    """Ranks of one host that communicate through shared memory.

    Args:
        store: where the ranks meet; torch gives each group one of its own.
        names: the ranks as the program numbers them, in the group's order.
        timeout: seconds that an operation may take.

    Raises:
        ShmError: on a machine where this cannot work, or if the ranks do not meet.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float, names: list[int], group_id: str) -> None:
        if why := unsupported():
            raise ShmError(f"the shm backend cannot be used: {why}. Use the gloo backend")
        super().__init__(rank, size)  # type: ignore[call-arg]  # torch 2.13 cannot give a Python group its store
        shim.refuse_calls_past_python(self)
        self._rank, self._size, self._store = rank, size, store
        segment, peers = rendezvous(store, rank, size, timeout, names)
        label = f"the shm group {group_id} (ranks {', '.join(map(str, names))})"
        queue = Queue(Mailbox(segment, rank), peers, label, timeout)
        self._queue: Queue | None = queue
        self._label = label
        self._reducers: dict[Any, AllReducer] = {}
        self._together: list[Ticket] | None = None
        self._results_together: list[Tensor] = []
        guard(queue)

    # What torch reads of a group

    def getBackendName(self) -> str:
        return "shm"

    def _get_backend(self, device: torch.device) -> ShmGroup:  # type: ignore[override]
        if torch.device(device).type != "cpu":
            raise RuntimeError(f"the shm backend moves CPU tensors only, not those of {device}")
        return self

    get_backend = _get_backend  # torch 2.15 calls it by this name

    adds_in_tree = True
    """Whether sums of more than two ranks, of float32 and float64, are those of `layout.tree` over the ranks."""

    def look_further(self, look: Callable[[str], str]) -> None:
        """Who waits here for long asks this too whether the wait is in vain: with what it waits in, for why."""
        if self._queue is not None:
            self._queue.look_further = look

    supports_coalescing = False
    supports_splitting = False

    def get_group_store(self) -> Any:
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        self._alive().timeout = timeout.total_seconds()

    _set_default_timeout = set_timeout

    @property
    def timeout(self) -> float:
        return self._alive().timeout

    def shutdown(self) -> None:
        """Leave the group and free its memory; ranks that still wait for this one are notified."""
        queue, self._queue = self._queue, None
        for reducer in self._reducers.values():
            reducer.close()
        if queue is not None:
            queue.close()

    abort = shutdown

    def __del__(self) -> None:
        # At the interpreter's end what this needs may be gone; the others see that the process is.
        if getattr(self, "_queue", None) is not None and not sys.is_finalizing():
            self.shutdown()

    # Reductions

    @_via_dispatcher
    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> ShmWork:
        opts = opts or dist.AllreduceOptions()
        reducer, timeout = self.all_reducer(opts.reduceOp.op), self._timeout_of(opts)
        tickets = [reducer.start([tensor], opts, timeout) for tensor in tensors]
        return self._work([ticket for ticket in tickets if ticket is not None], opts, list(tensors))

    @_via_dispatcher
    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> ShmWork:
        return self.allreduce(tensors, opts or dist.AllreduceCoalescedOptions())

    def all_reducer(self, op: Any) -> AllReducer:
        """All-reduces by one operation, at less cost than by `allreduce`: of the options only `asyncOp` counts, what
        has ended has no work, and the dispatcher does not see the call."""
        found = self._reducers.get(op)
        if found is None:
            found = self._reducers[op] = AllReducer(self._queue, op, self._label)
        return found

    @_via_dispatcher
    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> ShmWork:
        op, root, tickets = opts.reduceOp.op, opts.rootRank, []
        for tensor in tensors:
            outputs: list[tuple[Tensor, Tensor]] = []
            flat = flat_output(tensor, outputs, filled=True)
            by = self.all_reducer(op).by(flat.dtype)
            text = words("reduce", by.name, flat.numel(), flat.dtype, f" to rank {root} of the group")
            operation = c.Reduce(text, flat, root, by)
            tickets.append(self._start(text, operation, opts, [tensor], outputs if root == self._rank else []))
        return self._work(tickets, opts)

    @_via_dispatcher
    def reduce_scatter(self, outs: Sequence[Tensor], ins: Sequence[Sequence[Tensor]], opts: Any = None) -> ShmWork:
        opts = opts or dist.ReduceScatterOptions()
        op = opts.reduceOp.op
        pairs = zip(outs, ins, strict=True)
        return self._work([self._reduce_scatter(o, [flat_input(t) for t in i], op, opts) for o, i in pairs], opts)

    @_via_dispatcher
    def _reduce_scatter_base(self, out: Tensor, whole: Tensor, opts: Any = None) -> ShmWork:
        opts = opts or dist.ReduceScatterOptions()
        parts = equal_parts(flat_input(whole), out, self._size, "reduce-scatter")
        return self._work([self._reduce_scatter(out, parts, opts.reduceOp.op, opts)], opts)

    @_via_dispatcher
    def reduce_scatter_tensor_coalesced(self, outs: list[Tensor], ins: list[Tensor], opts: Any = None) -> ShmWork:
        opts = opts or dist.ReduceScatterOptions()
        op, tickets = opts.reduceOp.op, []
        for out, whole in zip(outs, ins, strict=True):
            parts = equal_parts(flat_input(whole), out, self._size, "reduce-scatter")
            tickets.append(self._reduce_scatter(out, parts, op, opts))
        return self._work(tickets, opts)

    def _reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], op: Any, opts: Any) -> Ticket:
        check_count(parts, self._size, "reduce-scatter: input tensors")
        outputs: list[tuple[Tensor, Tensor]] = []
        flat = flat_output(out, outputs)
        by = self.all_reducer(op).by(flat.dtype)
        sizes = [part.numel() for part in parts]
        check_numel("reduce-scatter", flat, parts[self._rank])
        check_dtype("reduce-scatter", flat.dtype, parts)
        text = words("reduce-scatter", by.name, one_or_all(sizes), flat.dtype)
        return self._start(text, c.ReduceScatter(text, parts, flat, by), opts, [out], outputs)

    # Copies of what one rank has

    @_via_dispatcher
    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> ShmWork:
        root, tickets = opts.rootRank, []
        for tensor in tensors:
            outputs: list[tuple[Tensor, Tensor]] = []
            mine = root == self._rank
            flat = flat_input(tensor) if mine else flat_output(tensor, outputs)
            n = flat.numel()
            text = words("broadcast", "", n, flat.dtype, f" from rank {root} of the group")
            spread = c.Spread(text, flat if mine else None, {} if mine else {root: flat}, n, flat.element_size())
            tickets.append(self._start(text, spread, opts, [tensor], outputs))
        return self._work(tickets, opts)

    @_via_dispatcher
    def allgather(self, outs: Sequence[Sequence[Tensor]], ins: Sequence[Tensor], opts: Any = None) -> ShmWork:
        opts = opts or shim.AllgatherOptions()
        pairs = list(zip(outs, ins, strict=True))
        return self._work([self._all_gather_list(out, one, opts) for out, one in pairs], opts)

    allgather_coalesced = allgather

    @_via_dispatcher
    def _allgather_base(self, out: Tensor, one: Tensor, opts: Any = None) -> ShmWork:
        opts = opts or shim.AllgatherOptions()
        return self._work([self._all_gather(out, one, opts)], opts)

    @_via_dispatcher
    def allgather_into_tensor_coalesced(self, outs: list[Tensor], ins: list[Tensor], opts: Any = None) -> ShmWork:
        opts = opts or shim.AllgatherOptions()
        return self._work([self._all_gather(out, one, opts) for out, one in zip(outs, ins, strict=True)], opts)

    def _all_gather_list(self, outs: Sequence[Tensor], one: Tensor, opts: Any) -> Ticket:
        check_count(outs, self._size, "all-gather: output tensors")
        outputs: list[tuple[Tensor, Tensor]] = []
        flats = [flat_output(out, outputs) for out in outs]
        return self._gather_all(flats, flat_input(one), opts, list(outs), outputs)

    def _all_gather(self, out: Tensor, one: Tensor, opts: Any) -> Ticket:
        outputs: list[tuple[Tensor, Tensor]] = []
        flats = equal_parts(flat_output(out, outputs), one, self._size, "all-gather")
        return self._gather_all(flats, flat_input(one), opts, [out], outputs)

    def _gather_all(
        self,
        flats: Sequence[Tensor],
        one: Tensor,
        opts: Any,
        results: list[Tensor],
        outputs: list[tuple[Tensor, Tensor]],
    ) -> Ticket:
        sizes = [flat.numel() for flat in flats]
        check_numel("all-gather", flats[self._rank], one)
        check_dtype("all-gather", one.dtype, flats)
        text = words("all-gather", "", one_or_all(sizes), one.dtype)
        spread = c.Spread(text, one, dict(enumerate(flats)), max(sizes), one.element_size())
        return self._start(text, spread, opts, results, outputs)

    @_via_dispatcher
    def gather(self, outs: Sequence[Sequence[Tensor]], ins: Sequence[Tensor], opts: Any) -> ShmWork:
        root, one = opts.rootRank, flat_input(ins[0])
        outputs: list[tuple[Tensor, Tensor]] = []
        targets = {}
        if root == self._rank:
            check_count(outs[0], self._size, "gather: output tensors")
            targets = {r: flat_output(out, outputs) for r, out in enumerate(outs[0])}
            check_dtype("gather", one.dtype, list(targets.values()))
            for target in targets.values():
                check_numel("gather", target, one)
        text = words("gather", "", one.numel(), one.dtype, f" to rank {root} of the group")
        source = one if root != self._rank or self._size == 1 else None
        if source is None:
            targets.pop(root).copy_(one)
        spread = c.Spread(text, source, targets, one.numel(), one.element_size())
        return self._work([self._start(text, spread, opts, [o for out in outs for o in out], outputs)], opts)

    # A tensor for each rank

    @_via_dispatcher
    def scatter(self, outs: Sequence[Tensor], ins: Sequence[Sequence[Tensor]], opts: Any) -> ShmWork:
        root = opts.rootRank
        outputs: list[tuple[Tensor, Tensor]] = []
        out = flat_output(outs[0], outputs)
        sources = {}
        if root == self._rank:
            check_count(ins[0], self._size, "scatter: input tensors")
            sources = {r: flat_input(one) for r, one in enumerate(ins[0])}
            check_dtype("scatter", out.dtype, list(sources.values()))
            for source in sources.values():
                check_numel("scatter", out, source)
        n, size = out.numel(), out.element_size()
        text = words("scatter", "", n, out.dtype, f" from rank {root} of the group")
        parcels = c.Parcels(text, sources, {root: out}, n, size, self._size)
        return self._work([self._start(text, parcels, opts, list(outs), outputs)], opts)

    @_via_dispatcher
    def alltoall(self, outs: Sequence[Tensor], ins: Sequence[Tensor], opts: Any = None) -> ShmWork:
        check_count(outs, self._size, "all-to-all: output tensors")
        check_count(ins, self._size, "all-to-all: input tensors")
        outputs: list[tuple[Tensor, Tensor]] = []
        flats = [flat_output(out, outputs) for out in outs]
        return self._all_to_all(flats, [flat_input(one) for one in ins], opts, list(outs), outputs)

    @_via_dispatcher
    def alltoall_base(
        self, out: Tensor, whole: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any = None
    ) -> ShmWork:
        outputs: list[tuple[Tensor, Tensor]] = []
        targets = parts_of(flat_output(out, outputs), out, out_splits, self._size, "output")
        sources = parts_of(flat_input(whole), whole, in_splits, self._size, "input")
        return self._all_to_all(targets, sources, opts, [out], outputs)

    def _all_to_all(
        self,
        targets: Sequence[Tensor],
        sources: Sequence[Tensor],
        opts: Any,
        results: list[Tensor],
        outputs: list[tuple[Tensor, Tensor]],
    ) -> ShmWork:
        opts = opts or dist.AllToAllOptions()
        dtype, me = targets[0].dtype, self._rank
        check_dtype("all-to-all", dtype, [*targets, *sources])
        check_numel("all-to-all", targets[me], sources[me])
        text = f"all-to-all of {dtype_name(dtype)}"
        parcels = c.Parcels(text, dict(enumerate(sources)), dict(enumerate(targets)), None, dtype.itemsize, self._size)
        return self._work([self._start(text, parcels, opts, results, outputs)], opts)

    # Messages and barriers

    @_via_dispatcher
    def send(self, tensors: Sequence[Tensor], target: int, tag: int) -> ShmWork:
        data = flat_input(tensors[0])
        ticket = self._ticket(
            f"send of {data.numel()} {dtype_name(data.dtype)} to rank {target} of the group (tag {tag})"
        )
        queue = self._alive()
        queue.send(ticket, target, as_bytes(data), tag, dtype_name(data.dtype).encode().ljust(32, b"\0"))
        return self._work([ticket])

    @_via_dispatcher
    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> ShmWork:
        return self._receive(tensors[0], source, tag, f"from rank {source} of the group")

    @_via_dispatcher
    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> ShmWork:
        return self._receive(tensors[0], ANY, tag, "from any rank")

    def _receive(self, tensor: Tensor, source: int, tag: int, peer: str) -> ShmWork:
        outputs: list[tuple[Tensor, Tensor]] = []
        flat = flat_output(tensor, outputs)
        ticket = self._ticket(
            f"receive of {flat.numel()} {dtype_name(flat.dtype)} {peer} (tag {tag})", [tensor], outputs
        )
        self._alive().receive(ticket, source, as_bytes(flat), tag, dtype_name(flat.dtype).encode().ljust(32, b"\0"))
        return self._work([ticket])

    @_via_dispatcher
    def barrier(self, opts: Any = None) -> ShmWork:
        opts = opts or dist.BarrierOptions()
        return self._work([self._start("barrier", c.Meeting("barrier"), opts, [], [])], opts)

    def _start_coalescing(self, device: torch.device) -> None:
        self._together, self._results_together = [], []

    def _end_coalescing(self, device: torch.device) -> ShmWork:
        tickets, self._together = self._together or [], None
        return ShmWork(self._alive(), tickets, self._results_together)

    # torch 2.13 renamed these; 2.11 calls them by the old names.
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    # Helpers

    def _alive(self) -> Queue:
        if self._queue is None:
            raise ShmError(f"{self._label} was destroyed (destroy_process_group)")
        return self._queue

    def _timeout_of(self, opts: Any) -> float:
        own = opts.timeout.total_seconds() if opts is not None else 0.0
        return own if own > 0 else self._alive().timeout

    def _ticket(
        self,
        text: str,
        results: Sequence[Tensor] = (),
        outputs: Sequence[tuple[Tensor, Tensor]] = (),
        opts: Any = None,
        operation: c.Meeting | None = None,
    ) -> Ticket:
        return Ticket(self._alive(), text, self._timeout_of(opts), list(results), list(outputs), operation)

    def _start(
        self, text: str, operation: c.Meeting, opts: Any, results: list[Tensor], outputs: list[tuple[Tensor, Tensor]]
    ) -> Ticket:
        ticket = self._ticket(text, results, outputs, opts, operation)
        self._alive().start(ticket, awaited=not opts.asyncOp)
        return ticket

    def _work(self, tickets: list[Ticket], opts: Any = None, results: list[Tensor] | None = None) -> ShmWork:
        """What torch gets. results: its results, if there are others than those of the tickets."""
        queue = self._alive()
        if results is None:
            results = [tensor for ticket in tickets for tensor in ticket.results]
        if self._together is not None:
            self._together += tickets
            self._results_together += results
        if (opts is None or opts.asyncOp) and tickets and not tickets[-1].given:
            progress.watch(queue, now=opts is None)
        return ShmWork(queue, tickets, results)
