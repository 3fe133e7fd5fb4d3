"""What the shm backend says when a rank dies, comes late, leaves, or does something else than the others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # its scenes are waits
HERE = Path(__file__).parent
WELL_BEFORE_THE_TIMEOUT = 10  # seconds; the scenes give 20 where they do not say


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    program = [sys.executable, str(HERE / "shm_failures.py")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_rank_that_never_comes_is_named(seen: dict[str, Any]) -> None:
    for rank in (0, 2):
        assert seen["never_comes"][rank] == f"ShmError: rank {rank}: rank 1 did not come to the shm group within 1 s"


def test_a_dead_rank_is_named_long_before_the_timeout_and_the_group_refuses_from_then_on(seen: dict[str, Any]) -> None:
    assert seen["dies"][1] == "ended 9"
    for rank in (0, 2):
        (kind, text, seconds), (kind_after, refusal, seconds_after) = seen["dies"][rank]
        assert (kind, kind_after) == ("ShmError", "ShmError")
        assert "rank 1 (process" in text
        assert f"rank {rank}: barrier is refused" in refusal
        assert "is broken" in refusal
        assert seconds < WELL_BEFORE_THE_TIMEOUT
        assert seconds_after < WELL_BEFORE_THE_TIMEOUT
    # The rank that notices first says what it was doing; the other may be told that the group is broken already.
    noticed = [text for text in (seen["dies"][rank][0][1] for rank in (0, 2)) if "cannot end: rank 1 (process" in text]
    assert noticed
    assert all("all-reduce (sum) of 5 float32" in text for text in noticed)


def test_a_future_ends_with_the_error_too(seen: dict[str, Any]) -> None:
    for rank in (0, 2):
        _, text, seconds = seen["dies_while_others_hold_futures"][rank]
        assert "rank 1 (process" in text
        assert seconds < WELL_BEFORE_THE_TIMEOUT


def test_ranks_killed_at_random_moments_are_named_by_all_others(seen: dict[str, Any]) -> None:
    for first, killed, last in seen["random"]:
        assert killed == "ended 9"
        for kind, text, seconds in (first, last):
            assert kind == "ShmError"
            assert "rank 1 (process" in text
            assert seconds < WELL_BEFORE_THE_TIMEOUT


def test_a_late_rank_is_named_and_finds_the_group_broken(seen: dict[str, Any]) -> None:
    for rank in (0, 2):
        (kind, text, seconds), (again, _, _) = seen["late"][rank]
        assert (kind, again) == ("ShmError", "ShmError")
        assert text.endswith("took more than 0.8 s: rank 1 did not come")
        assert 0.7 < seconds < WELL_BEFORE_THE_TIMEOUT
    kind, text, _ = seen["late"][1]
    assert kind == "ShmError"
    assert "is refused" in text
    assert "rank 1 did not come" in text


def test_wait_can_be_given_less_time_than_the_group(seen: dict[str, Any]) -> None:
    _, text, seconds = seen["shorter_wait"][0]
    assert text.endswith("took more than 0.2 s: rank 1 did not come")
    assert seconds < WELL_BEFORE_THE_TIMEOUT


def test_a_receive_that_nobody_sends_to_says_from_whom(seen: dict[str, Any]) -> None:
    _, text, _ = seen["nobody_sends"][0]
    assert "receive of 5 float32 from rank 1 of the group (tag 6)" in text
    assert text.endswith("rank 1 did not come")


def test_a_rank_that_left_is_named(seen: dict[str, Any]) -> None:
    for rank in (0, 2):
        _, text, seconds = seen["leaves"][rank]
        assert "rank 1 has left the group" in text
        assert seconds < WELL_BEFORE_THE_TIMEOUT


def test_work_of_a_destroyed_group_fails(seen: dict[str, Any]) -> None:
    _, text, _ = seen["own_work_is_lost"][0]
    assert "was not finished: it was destroyed" in text


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        ("operation", ["all-reduce (sum) of 5 float32", "broadcast of 5 float32"]),
        ("elements", ["all-reduce (sum) of 5 float32", "all-reduce (sum) of 6 float32"]),
        ("dtype", ["all-reduce (sum) of 5 float32", "all-reduce (sum) of 5 int32"]),
        ("reduction", ["all-reduce (sum) of 5 float32", "all-reduce (maximum) of 5 float32"]),
        ("root", ["from rank 0 of the group", "from rank 1 of the group"]),
        ("rounds", ["all-reduce (sum) of 5 float32", "all-reduce (sum) of 900000 float32"]),
    ],
)
def test_ranks_that_do_not_do_the_same_are_told_what_each_does(
    seen: dict[str, Any], scene: str, said: list[str]
) -> None:
    for kind, text, seconds in seen[scene]:
        assert kind == "ShmError"
        assert "disagree" in text
        for does in (f"rank 0 does {said[0]}", f"rank 1 does {said[1]}"):
            assert scene == "root" or does in text
        assert all(does in text for does in said)
        assert seconds < WELL_BEFORE_THE_TIMEOUT


def test_lengths_that_only_two_ranks_know_are_compared(seen: dict[str, Any]) -> None:
    texts = [text for _, text, _ in seen["splits"]]
    assert any("rank 1 sends 1 elements to rank 0, which expects 3" in text for text in texts)
    assert all("sends" in text for text in texts)
    _, text, _ = seen["message"][1]
    assert text.startswith("rank 0 sent 20 bytes of float32 with tag 0 to rank 1, which receives 24 bytes")


def test_groups_leave_no_files_and_no_memory_behind(seen: dict[str, Any]) -> None:
    for files_before, maps_before, files_after, maps_after in seen["many_groups"]:
        assert maps_before == 1
        assert (files_after, maps_after) == (files_before, maps_before)
    # The one that Python's mmap keeps as long as the mapping lives; the file has no name.
    assert seen["descriptors"] == [["/memfd:shardgrad-shm (deleted)"]] * 2
    assert seen["left in /dev/shm"] == []


def test_a_store_can_be_used_again(seen: dict[str, Any]) -> None:
    assert seen["twice"] == [[2, 2, 2]] * 2


def test_refusals_say_what_to_do(seen: dict[str, Any]) -> None:
    _, text, _ = seen["no_memory"][0]
    assert text.startswith("no memory for a shm group")
    assert "gloo" in text
    _, text, _ = seen["other_processor"][0]
    assert "aarch64" in text
    assert "Use the gloo backend" in text
