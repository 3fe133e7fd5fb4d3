"""Grouped heads sharded over an axis: which key and value heads a rank's query heads attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardgrad.layout.sizes import chunk, chunks


@dataclass(frozen=True, slots=True)
class Heads:
    """This rank's part of `queries` query heads, of which each `queries / groups` consecutive ones share a KV head.

    first, count: its query heads, as the axis shards them.
    first_kv, count_kv: the KV heads that these attend.
    aligned: whether on every rank those are the KV heads as the axis shards them, so they can be stored sharded.
    """

    queries: int
    groups: int
    first: int
    count: int
    first_kv: int
    count_kv: int
    aligned: bool

    @classmethod
    def of(cls, queries: int, groups: int, ranks: int, index: int) -> Heads:
        share = queries // groups
        first, count = chunk(queries, ranks, index)
        first_kv = first // share
        count_kv = -(-(first + count) // share) - first_kv if count else 0
        aligned = chunks(queries, ranks) == [share * kv for kv in chunks(groups, ranks)]
        return cls(queries, groups, first, count, first_kv if count else 0, count_kv, aligned)

    @property
    def shares(self) -> tuple[int, ...]:
        """How many of this rank's query heads attend each of its KV heads."""
        share = self.queries // self.groups
        last = self.first + self.count
        kv = range(self.first_kv, self.first_kv + self.count_kv)
        return tuple(min((at + 1) * share, last) - max(at * share, self.first) for at in kv)

    def per_query(self, kv: Tensor) -> Tensor:
        """One KV head for each query head: [b, s, g, k] → [b, s, h, k]."""
        parts = [kv.narrow(2, at, 1).expand(-1, -1, share, -1) for at, share in enumerate(self.shares)]
        return torch.cat(parts, 2)
