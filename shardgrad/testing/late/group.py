"""The process group that `init_process_group("late")` makes."""

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
from shardgrad.comm.mesh import axis_name

from . import parts
from .findings import ledger
from .lane import Collective, Lane
from .messages import Messages, Receive, Send
from .nccl import check_lists, check_reduction, check_tensors
from .order import Key, Launch
from .place import here
from .stuck import Count, Waiting
from .transfer import Transfer, Wire
from .work import LateWork


def _via_dispatcher(method: Callable[..., LateWork]) -> Callable[..., LateWork]:
    """Show the call to modes that listen to PyTorch's dispatcher, as other backends do, and nothing of what it does."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: LateGroup, *args: Any, **kwargs: Any) -> LateWork:
        if shim.dispatch_mode_active():
            shim.call_shadow(self, name, *args, **kwargs)
        with shim.no_modes():
            return method(self, *args, **kwargs)

    return shim.untraced(call)


class LateGroup(dist.ProcessGroup):
    """Ranks that communicate through gloo, and see of it what NCCL promises, no more.

    Args:
        names: the ranks as the program numbers them, in the group's order.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, names: list[int], group_id: str) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        shim.refuse_calls_past_python(self)
        self._rank, self._size, self._names = rank, size, names
        self._store, self._timeout = store, timeout
        self._wire = Wire(store, rank, size, timeout)
        self._lane = Lane(self._wire, names, f"the group of ranks {', '.join(map(str, names))}")
        self._messages = Messages(self._wire, names)
        ledger.forget_counts(group_id)
        self._together: list[Transfer] | None = None

    # What torch reads of a group

    def getBackendName(self) -> str:
        return "late"

    def _get_backend(self, device: torch.device) -> LateGroup:  # type: ignore[override]
        if torch.device(device).type != "cpu":
            raise RuntimeError(f"the late backend moves CPU tensors only, not those of {device}")
        return self

    get_backend = _get_backend  # torch 2.15 calls it by this name
    supports_coalescing = False
    supports_splitting = False

    def get_group_store(self) -> Any:
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    _set_default_timeout = set_timeout

    @property
    def timeout(self) -> float:
        return self._timeout.total_seconds()

    def shutdown(self) -> None:
        self._lane.close()

    abort = shutdown

    def __del__(self) -> None:
        if getattr(self, "_lane", None) is not None and not sys.is_finalizing():
            self.shutdown()

    # Collectives

    @_via_dispatcher
    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> LateWork:
        opts = opts or dist.AllreduceOptions()
        return self._reduce(tensors, opts, "all-reduce")

    @_via_dispatcher
    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> LateWork:
        opts = opts or dist.AllreduceCoalescedOptions()
        return self._reduce(tensors, opts, "all-reduce")

    @_via_dispatcher
    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> LateWork:
        return self._reduce(tensors, opts, f"reduce to {self._names[opts.rootRank]}", opts.rootRank)

    def _reduce(self, tensors: Sequence[Tensor], opts: Any, word: str, root: int | None = None) -> LateWork:
        check_tensors(word, tensors)
        check_reduction(word, opts.reduceOp.op, tensors)
        keeps = root is None or root == self._rank
        return self._start([parts.reduced(word, x, opts.reduceOp, keeps) for x in tensors], opts, list(tensors))

    @_via_dispatcher
    def _reduce_scatter_base(self, out: Tensor, whole: Tensor, opts: Any = None) -> LateWork:
        return self._reduce_scatter([out], [whole], opts)

    @_via_dispatcher
    def reduce_scatter_tensor_coalesced(self, outs: list[Tensor], ins: list[Tensor], opts: Any = None) -> LateWork:
        return self._reduce_scatter(outs, ins, opts)

    def _reduce_scatter(self, outs: Sequence[Tensor], ins: Sequence[Tensor], opts: Any) -> LateWork:
        opts = opts or dist.ReduceScatterOptions()
        pairs = list(zip(outs, ins, strict=True))
        for out, whole in pairs:
            check_tensors("reduce-scatter", [out, whole], larger=(whole, out, self._size))
            check_reduction("reduce-scatter", opts.reduceOp.op, [whole])
        return self._start([parts.scattered(o, w, opts.reduceOp, self._rank) for o, w in pairs], opts, list(outs))

    @_via_dispatcher
    def reduce_scatter(self, outs: Sequence[Tensor], ins: Sequence[Sequence[Tensor]], opts: Any = None) -> LateWork:
        opts = opts or dist.ReduceScatterOptions()
        pairs = list(zip(outs, ins, strict=True))
        for out, terms in pairs:
            check_lists("reduce-scatter", out, terms, self._size, out, terms[self._rank])
            check_reduction("reduce-scatter", opts.reduceOp.op, terms)
        transfers = [parts.scattered_list(o, terms, opts.reduceOp, self._rank) for o, terms in pairs]
        return self._start(transfers, opts, list(outs))

    @_via_dispatcher
    def _allgather_base(self, out: Tensor, one: Tensor, opts: Any = None) -> LateWork:
        return self._all_gather([out], [one], opts)

    @_via_dispatcher
    def allgather_into_tensor_coalesced(self, outs: list[Tensor], ins: list[Tensor], opts: Any = None) -> LateWork:
        return self._all_gather(outs, ins, opts)

    def _all_gather(self, outs: Sequence[Tensor], ins: Sequence[Tensor], opts: Any) -> LateWork:
        opts = opts or shim.AllgatherOptions()
        pairs = list(zip(outs, ins, strict=True))
        for out, one in pairs:
            check_tensors("all-gather", [out, one], larger=(out, one, self._size))
        return self._start([parts.gathered([out], one, self._size) for out, one in pairs], opts, list(outs))

    @_via_dispatcher
    def allgather(self, outs: Sequence[Sequence[Tensor]], ins: Sequence[Tensor], opts: Any = None) -> LateWork:
        opts = opts or shim.AllgatherOptions()
        pairs = list(zip(outs, ins, strict=True))
        for out, one in pairs:
            check_lists("all-gather", one, out, self._size, out[self._rank], one)
        transfers = [parts.gathered(out, one, self._size) for out, one in pairs]
        return self._start(transfers, opts, [x for out in outs for x in out])

    allgather_coalesced = allgather

    @_via_dispatcher
    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> LateWork:
        check_tensors("broadcast", tensors)
        word = f"broadcast from {self._names[opts.rootRank]}"
        transfers = [parts.spread(word, x, opts.rootRank, self._rank, self._size) for x in tensors]
        return self._start(transfers, opts, list(tensors))

    @_via_dispatcher
    def gather(self, outs: Sequence[Sequence[Tensor]], ins: Sequence[Tensor], opts: Any) -> LateWork:
        one, root = ins[0], opts.rootRank
        targets = list(outs[0]) if outs and root == self._rank else []
        check_lists("gather", one, targets, self._size if targets else 0, *([targets[root], one] if targets else []))
        word = f"gather to {self._names[root]}"
        return self._start([parts.collected(word, targets, one, root, self._size)], opts, targets)

    @_via_dispatcher
    def scatter(self, outs: Sequence[Tensor], ins: Sequence[Sequence[Tensor]], opts: Any) -> LateWork:
        out, root = outs[0], opts.rootRank
        sources = list(ins[0]) if ins and root == self._rank else []
        check_lists("scatter", out, sources, self._size if sources else 0, *([out, sources[root]] if sources else []))
        word = f"scatter from {self._names[root]}"
        return self._start([parts.dealt(word, out, sources, root, self._size)], opts, [out])

    @_via_dispatcher
    def alltoall_base(
        self, out: Tensor, whole: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any = None
    ) -> LateWork:
        check_tensors("all-to-all", [out, whole])
        transfer = parts.swapped_rows(out, whole, out_splits, in_splits, self._size)
        return self._start([transfer], opts or dist.AllToAllOptions(), [out])

    @_via_dispatcher
    def alltoall(self, outs: Sequence[Tensor], ins: Sequence[Tensor], opts: Any = None) -> LateWork:
        check_lists("all-to-all", outs[0], [*outs, *ins], 2 * self._size)
        return self._start([parts.swapped(outs, ins)], opts or dist.AllToAllOptions(), list(outs))

    @_via_dispatcher
    def barrier(self, opts: Any = None) -> LateWork:
        return self._start([parts.meeting()], opts or dist.BarrierOptions(), [])

    # torch 2.13 renamed these; 2.11 calls them by the old names.
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    # Messages

    @_via_dispatcher
    def send(self, tensors: Sequence[Tensor], target: int, tag: int) -> LateWork:
        check_tensors("send", tensors)
        x = tensors[0]
        what = f"{parts.named('send', x)} to rank {self._names[target]}"
        ledger.check_use(what, x, writes=False)
        pending = Send(what, [], [(x, parts.copied(x))])
        key = self._messages.key(self.group_name, self._rank, target, sends=True)
        self._launch([key], what, message=True)
        ledger.counts[self.group_name, *key.ranks] = self._messages.sent(target) + 1
        self._messages.send(pending, x, target, tag)
        pending.begin()
        return LateWork(pending, [x])

    @_via_dispatcher
    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> LateWork:
        check_tensors("recv", tensors)
        x = tensors[0]
        what = f"{parts.named('recv', x)} from rank {self._names[source]}"
        ledger.check_use(what, x, writes=True, only_writes=True)
        key, number = (
            self._messages.key(self.group_name, self._rank, source, sends=False),
            self._messages.received(source),
        )
        by: Count = (self.group_name, *key.ranks)
        pending = Receive(what, x, source, lambda text: Waiting(by, key.ranks, number, text, ledger.counts))
        self._launch([key], what, message=True)
        self._messages.receive(pending, x, tag)
        pending.begin()
        return LateWork(pending, [x])

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> LateWork:
        raise NotImplementedError(f"ProcessGroupNCCL does not support recvAnysource (at {here()}): name the source")

    # Coalescing

    def _start_coalescing(self, device: torch.device) -> None:
        self._together = []

    def _end_coalescing(self, device: torch.device) -> LateWork:
        transfers, self._together = self._together or [], None
        with shim.no_modes():
            return self._start(transfers, None, [out for one in transfers for out in one.outs])

    # Helpers

    def _start(self, transfers: list[Transfer], opts: Any, results: list[Tensor]) -> LateWork:
        if self._together is not None:
            self._together += transfers
            return LateWork(None, results)
        what = f"{'; '.join(one.call for one in transfers)} over {self._label()}"
        for one in transfers:
            for x, _ in one.kept:
                ledger.check_use(what, x, writes=False)
            for out in one.outs:
                ledger.check_use(what, out, writes=True, only_writes=not one.in_place)
        name, ranks = self.group_name, tuple(self._names)
        number = ledger.counts.get((name,), 0)
        collective = Collective(what, transfers, lambda text: Waiting((name,), ranks, number, text, ledger.counts))
        self._launch([Key(name, ranks, f"collective {number}")], what)
        ledger.counts[name,] = number + 1
        self._lane.start(collective)
        if opts is not None and not opts.asyncOp:
            collective.deliver(collective.result(None))
            return LateWork(None, results)
        collective.begin()
        return LateWork(collective, results)

    def _launch(self, keys: list[Key], what: str, message: bool = False) -> None:
        line = f"at {here().line}"
        joins = shim.batch_of_messages() if message else None
        if joins and ledger.launches:
            last = ledger.launches.pop()
            ledger.launches.append(Launch((*last.keys, *keys), (*last.texts, what), line))
        else:
            ledger.launches.append(Launch(tuple(keys), (what,), line))
        if ledger.reports:
            ledger.reports[-1].collectives += 1

    def _label(self) -> str:
        name = axis_name(self)
        return f"{self.group_name if name == 'undefined' else name!r} (ranks {', '.join(map(str, self._names))})"
