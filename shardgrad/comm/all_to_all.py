"""The all-to-all that moves shards from one dim to another, over one mesh axis. Not differentiable."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm.collectives import Collective, Handle, from_blocks, in_blocks, padded
from shardgrad.comm.mesh import Axis
from shardgrad.layout.sizes import chunk, chunks


class AllToAll(Collective):
    """From shards of the dim `concat` to shards of the dim `split`. `global_size`: of `concat` over all ranks."""

    __slots__ = ("_concat", "_size", "_split")

    def __init__(self, axis: Axis, split: int, concat: int, global_size: int) -> None:
        super().__init__(axis, "all-to-all", dist.all_to_all_single, dist.all_to_all_single)
        self._split, self._concat, self._size = split, concat, global_size

    def start(self, x: Tensor) -> Handle:
        ranks, split, concat = self.axis.size, self._split, self._concat
        size = x.shape[split]
        x = padded(x, concat, -(-self._size // ranks) - x.shape[concat])
        sent = in_blocks(x, split, ranks).movedim(split, 0).contiguous()
        received = torch.empty_like(sent)
        work = None
        if sent.numel():
            work = self._begin(sent, received.view(-1), sent.view(-1), None, None, self.axis.group, True)
        return work, received, sent, chunk(size, ranks, self.axis.index)[1]

    def wait(self, handle: Handle) -> Tensor:
        work, received, _, own = handle
        if work is not None:
            self._await(work)
        whole = from_blocks(received, self._concat, chunks(self._size, self.axis.size))
        return whole.narrow(self._split, 0, own)
