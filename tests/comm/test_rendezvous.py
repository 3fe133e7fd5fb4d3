"""Ranks find each other, and only each other, in a store that earlier ranks have used."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import PrefixStore

from shardgrad.comm.processes import this_process
from shardgrad.comm.rendezvous import rendezvous
from shardgrad.errors import CollectiveError


def meet(shared: dist.Store, ranks: int, delays: list[float], timeout: float = 20) -> list[object]:
    """What each of so many ranks, each a thread that starts late, finds the others to have written."""
    found: list[object] = [None] * ranks

    def come(rank: int) -> None:
        time.sleep(delays[rank])
        try:
            store = rendezvous(shared, rank, ranks, timedelta(seconds=timeout)).store
            store.set(f"address {rank}", f"{threading.get_ident()}")
            found[rank] = [store.get(f"address {other}").decode() for other in range(ranks)]
        except CollectiveError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [*found, [str(thread.ident) for thread in threads]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_attempt_finds_its_own_ranks(ranks: int) -> None:
    shared = dist.HashStore()
    for attempt in range(4):
        delays = [0.1 * ((rank + attempt) % ranks) for rank in range(ranks)]
        *found, own = meet(shared, ranks, delays)
        assert all(addresses == own for addresses in found), f"attempt {attempt}"


def test_who_never_comes_is_named() -> None:
    shared = dist.HashStore()
    with pytest.raises(CollectiveError, match="ranks 1, 2 never came"):
        rendezvous(shared, 0, 3, timedelta(seconds=0.1))
    with pytest.raises(CollectiveError, match=r"rank 2 has waited for .* rank 0 never came"):
        rendezvous(shared, 2, 3, timedelta(seconds=0.1))
    with pytest.raises(CollectiveError, match="rank 1 never came"):
        rendezvous(shared, 0, 3, timedelta(seconds=0.1))


def test_a_rank_that_died_while_waiting_is_not_waited_for() -> None:
    """Its mark is there, but it does not answer: the one that takes its place does."""
    shared = dist.HashStore()
    with pytest.raises(CollectiveError):
        rendezvous(shared, 1, 2, timedelta(seconds=0.1))
    *found, own = meet(shared, 2, [0.0, 0.3])
    assert found == [own, own]


@pytest.mark.slow
def test_a_rank_that_comes_is_waited_for_while_it_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = dist.HashStore()
    own = this_process()
    coming = PrefixStore("shardgrad meeting", shared)
    coming.set("coming 1", json.dumps(own.as_json()))
    threads = threading.Timer(2.0, rendezvous, [shared, 1, 2, timedelta(seconds=9)])
    threads.start()
    assert rendezvous(shared, 0, 2, timedelta(seconds=0.1)).processes == {0: own, 1: own}
    threads.join()
    coming.set("coming 1", json.dumps(replace(own, place=("elsewhere", "")).as_json()))
    with pytest.raises(CollectiveError, match="rank 1 has come, and does not answer"):
        rendezvous(shared, 0, 2, timedelta(seconds=0.1), timedelta(seconds=0.2))
    coming.set("coming 1", json.dumps(replace(own, started=own.started + 1).as_json()))
    with pytest.raises(CollectiveError, match=r"rank 1 \(process \d+\) died"):
        rendezvous(shared, 0, 2, timedelta(seconds=0.1))


def test_a_rank_that_refuses_is_named() -> None:
    shared = dist.HashStore()
    PrefixStore("shardgrad meeting", shared).set("refused", json.dumps({"rank": 1, "why": "no such file"}))
    with pytest.raises(CollectiveError, match="rank 1 does not take part: no such file"):
        rendezvous(shared, 0, 2, timedelta(seconds=9))
