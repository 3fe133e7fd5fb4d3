"""Ranks that die or freeze: the others end in time, and name them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from shardgrad.chaos.deaths import Attack, Outcome, attacks, carry_out, named


def test_attacks_are_the_same_for_a_seed_and_reach_all_kinds() -> None:
    made = list(attacks(5, 400))
    assert made == list(attacks(5, 400)) != list(attacks(6, 400))
    assert len({(one.how, one.backend, one.what, one.agent, one.rank == 0) for one in made}) == 32
    assert all(one.rank < one.ranks for one in made)


def test_what_counts_as_naming_a_rank() -> None:
    assert named(1, "rank 0: all-reduce cannot end: rank 1 (process 5) died")
    assert named(0, "the store, which rank 0 (at localhost:2) keeps, is gone")
    assert named(2, "ranks 1, 2 never came")
    assert not named(1, "rank 1: all-reduce failed: timed out. rank 0 (process 5) died")
    assert not named(1, "the store, which torchrun (at localhost:2) keeps, is gone")
    attack = next(attacks(0, 1))
    assert Outcome(attack, 29.0, True, "").held
    for bad in (Outcome(attack, 31.0, True, ""), Outcome(attack, None, True, ""), Outcome(attack, 1.0, False, "")):
        assert not bad.held


@pytest.mark.slow
def test_survivors_end_and_name_the_rank() -> None:
    """Three at once, for most of each is waiting. How soon, `shardgrad chaos deaths` says: not beside other tests."""
    chosen = [
        Attack("stopped", 0, 2, "gloo", "train", agent=False, after=6.0),
        Attack("killed", 0, 2, "gloo", "layers", agent=False, after=1.0),
        Attack("stopped", 1, 2, "shm", "layers", agent=False, after=1.0),
    ]
    with ThreadPoolExecutor(len(chosen)) as pool:
        for outcome in pool.map(carry_out, chosen):
            assert outcome.named, f"{outcome.attack}: {outcome.seconds}\n{outcome.text}"
            assert outcome.seconds is not None, f"{outcome.attack}: a survivor had not ended\n{outcome.text}"
