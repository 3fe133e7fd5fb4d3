"""A norm over features that are sharded (OLMo 2 normalises queries over all heads)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from shardgrad.errors import LayoutError
from shardgrad.models.features import Features
from shardgrad.nn.heads import Heads
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel


def norm(
    old: nn.Module, features: Features, sizes: Mapping[str, int], heads: Heads | None, parallel: Parallel, name: str
) -> ShardedModule:
    raise LayoutError(f"{name}: norms over sharded features are not known yet")
