"""The parts of a collective: bytes for each rank and from each, or a reduction; done by gloo on copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm import shim

from .memory import Bytes, memory
from .pending import Kept

_BOOL = {"SUM": "MAX", "MAX": "MAX", "PRODUCT": "MIN", "MIN": "MIN"}


class Transfer:
    """One part of a collective.

    call: what all ranks must say alike. outs: what it fills, one after another. kept: what it was given, with copies.
    sends, takes: bytes to each rank of the group, and how many come from each. in_place: what it fills it also reads.
    """

    in_place = False

    def __init__(self, call: str, outs: Sequence[Tensor], kept: Sequence[Kept]) -> None:
        self.call, self.outs, self.kept = call, list(outs), list(kept)
        self.sends: list[int] = []
        self.takes: list[int] = []

    def run(self, wire: Wire) -> Bytes:
        """The bytes for `outs`."""
        raise NotImplementedError


class Exchange(Transfer):
    """Bytes to each rank and from each: of this are all collectives that do not compute."""

    def __init__(
        self, call: str, pieces: Sequence[Bytes], takes: Sequence[int], outs: Sequence[Tensor], kept: Sequence[Kept]
    ) -> None:
        super().__init__(call, outs, kept)
        self._pieces = list(pieces)
        self.sends, self.takes = [piece.size for piece in pieces], list(takes)

    def run(self, wire: Wire) -> Bytes:
        return wire.exchange(self._pieces, self.takes)


class Reduction(Transfer):
    """A sum, or another reduction, of which a rank keeps all, a part, or nothing.

    given: a copy of this rank's term. keeps: the first byte and the one behind the last.
    """

    def __init__(
        self,
        call: str,
        given: Tensor,
        op: Any,
        keeps: tuple[int, int],
        outs: Sequence[Tensor],
        kept: Sequence[Kept],
        in_place: bool = False,
    ) -> None:
        super().__init__(call, outs, kept)
        self.in_place = in_place
        self._given, self._op, self._keeps = given, op, keeps

    def run(self, wire: Wire) -> Bytes:
        start, end = self._keeps
        return wire.reduce(self._given, self._op)[start:end]


class Wire:
    """gloo, for one group: it moves bytes and reduces tensors, each call to its end."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        self.rank, self.size = rank, size
        self.gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._all_to_all = shim.all_to_all_of(self.gloo)

    def exchange(self, pieces: Sequence[Bytes], takes: Sequence[int]) -> Bytes:
        given = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.uint8)
        if self.size == 1:
            return given.numpy()
        taken = torch.empty(sum(takes), dtype=torch.uint8)
        self._all_to_all(taken, given, list(takes), [piece.size for piece in pieces], dist.AllToAllOptions()).wait()
        return taken.numpy()

    def reduce(self, given: Tensor, op: Any) -> Bytes:
        total = given.clone()
        if self.size > 1:
            options = dist.AllreduceOptions()
            options.reduceOp = op
            if total.dtype is torch.bool:
                options.reduceOp = getattr(dist.ReduceOp, _BOOL[op.op.name])
                self.gloo.allreduce([total.view(torch.uint8)], options).wait()
            else:
                self.gloo.allreduce([torch.view_as_real(total) if total.is_complex() else total], options).wait()
        return memory(total).copy()
