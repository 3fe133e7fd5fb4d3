"""At the end of a block: the orders of all ranks, exchanged through the store, and what is wrong with them."""

from __future__ import annotations

import json
import time
import weakref
import zlib
from collections.abc import Sequence

import torch.distributed as dist

from shardgrad.comm import shim

from .findings import MOST_LAUNCHES, Finding, ledger
from .order import Key, Launch, inversions, unmatched
from .stuck import ended, goes_on

PATIENCE_S = 20.0
"""How long a rank waits at the end of a block for the others' orders."""


_blocks: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
"""How many blocks have ended in each default group."""


def compare_orders(launches: Sequence[Launch], failed: bool) -> tuple[list[Finding], list[str]]:
    """Findings about the order of all ranks, and notes on what could not be compared. Called by all ranks.

    failed: the block ended with an error on this rank: the others are told, and nothing is compared.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [], []
    world = dist.group.WORLD
    assert world is not None
    block = _blocks[world] = _blocks.get(world, 0) + 1
    store, rank = shim.store(), dist.get_rank()
    keys = [f"shardgrad/late/{block}/{other}" for other in range(dist.get_world_size())]
    mine = [] if failed else [(one.keys, one.texts, one.line) for one in launches]
    store.set(keys[rank], zlib.compress(json.dumps({"failed": failed, "launches": mine}).encode()))
    if failed:
        if rank:
            _leave(f"shardgrad/late/{block}/left", rank)
        return [], []
    ended(rank, ledger.counts)
    try:
        return _compare(keys)
    finally:
        goes_on(rank)
        _leave(f"shardgrad/late/{block}/left", rank)


def _leave(key: str, rank: int) -> None:
    """Rank 0, which may keep the store in its own process, goes last."""
    store, end = shim.store(), time.monotonic() + PATIENCE_S
    if rank:
        store.add(key, 1)
    while rank == 0 and store.add(key, 0) < dist.get_world_size() - 1 and time.monotonic() < end:
        time.sleep(0.001)


def _compare(keys: Sequence[str]) -> tuple[list[Finding], list[str]]:
    store, orders, end = shim.store(), {}, time.monotonic() + PATIENCE_S
    for other, key in enumerate(keys):
        while not store.check([key]):
            if time.monotonic() > end:
                return [], [f"rank {other} did not end the block within {PATIENCE_S:g} s: orders are not compared"]
            time.sleep(0.001)
        found = json.loads(zlib.decompress(store.get(key)))
        if found["failed"]:
            return [], [f"rank {other} left the block with an error: orders are not compared"]
        orders[other] = [_launch(one) for one in found["launches"]]
    findings = [Finding("order of ranks", text) for text in inversions(orders)]
    if all(len(order) < MOST_LAUNCHES for order in orders.values()):
        findings += [
            Finding(
                "never called", f"rank {has} started {text}, {line}, which rank {', '.join(map(str, absent))} never did"
            )
            for has, text, line, absent in unmatched(orders)
        ]
    return findings, []


def _launch(one: list) -> Launch:
    keys, texts, line = one
    return Launch(tuple(Key(group, tuple(ranks), number) for group, ranks, number in keys), tuple(texts), line)
