"""Processes of this host as others see them, questions to a store that may be silent, and the watch over both."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist

from shardgrad.comm import processes as of_host
from shardgrad.comm import watch as watching
from shardgrad.comm.ask import SilentStore, StoreError, ask
from shardgrad.comm.processes import Process, Processes, this_process
from shardgrad.comm.watch import Watch


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    yield made
    made.kill()
    made.communicate()


def seen(child: subprocess.Popen[bytes]) -> Process:
    return replace(this_process(), pid=child.pid, started=of_host.stat(child.pid)[1])


def until(state: str, process: Process) -> None:
    deadline = time.monotonic() + 10
    while process.state() != state:
        assert time.monotonic() < deadline, process.state()
        time.sleep(0.01)


def test_a_process_is_at_work_stopped_or_gone(child: subprocess.Popen[bytes]) -> None:
    process = seen(child)
    assert process.state() == "at work" == this_process().state()
    assert Process.from_json(process.as_json()) == process
    child.send_signal(signal.SIGSTOP)
    until("stopped", process)
    child.send_signal(signal.SIGCONT)
    until("at work", process)
    assert replace(process, started=process.started + 1).state() == "gone", "another process of the same number"
    child.kill()
    until("gone", process)  # though nobody has waited for it yet
    child.wait()
    assert process.state() == "gone"


def test_a_rank_counts_as_frozen_after_a_while_and_no_longer_when_it_goes_on(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_host, "STOPPED_S", 0.3)
    process = seen(child)
    elsewhere = replace(process, place=("another kernel", "pid:[1]"))
    ranks = Processes({0: this_process(), 3: process, 5: elsewhere, 6: replace(process, place=None)})
    assert ranks.trouble([0, 3, 5, 6, 7]) == ""
    child.send_signal(signal.SIGSTOP)
    until("stopped", process)
    assert ranks.trouble([0, 3, 5]) == "", "stopped just now"
    time.sleep(0.35)
    text = ranks.trouble([0, 3, 5])
    assert text.startswith(f"rank 3 (process {process.pid}) has been stopped for")
    assert "rank 5" not in text
    child.send_signal(signal.SIGCONT)
    until("at work", process)
    assert ranks.trouble([3]) == ""
    child.send_signal(signal.SIGSTOP)
    until("stopped", process)
    assert ranks.trouble([3]) == "", "it is counted anew"
    child.kill()
    until("gone", process)
    assert ranks.trouble([0, 3, 5]) == f"rank 3 (process {process.pid}) died"
    assert ranks.gone([0, 3, 5]) == [3]


def test_a_store_that_does_not_answer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    monkeypatch.setenv("MASTER_PORT", "29")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert ask(lambda: 5) == 5
    silent, began = threading.Event(), time.monotonic()
    with pytest.raises(SilentStore, match=r"which rank 0 \(at somewhere:29\) keeps, has not answered for 0.1 s"):
        ask(silent.wait, 0.1)
    assert time.monotonic() - began < 5
    silent.set()

    def broken() -> None:
        raise RuntimeError("recv failed\nmore of it")

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(StoreError, match=r"torchrun \(at somewhere:29\) keeps, is gone.* \(recv failed\)$"):
        ask(broken)

    def wrong() -> None:
        raise ValueError("a mistake of the asker's own")

    with pytest.raises(ValueError, match="own"):
        ask(wrong)


class Store:
    """A store in this process, whose answers can be held back."""

    def __init__(self) -> None:
        self.inner = dist.HashStore()
        self.answers = threading.Event()
        self.answers.set()

    def clone(self) -> Store:
        return self

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> object:
            self.answers.wait()
            return getattr(self.inner, name)(*arguments)

        return call


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_host, "STOPPED_S", 0.3)
    monkeypatch.setattr(watching, "SILENT_S", 2.0)
    monkeypatch.setattr(watching, "_LOOK_S", 0.05)
    monkeypatch.setattr(watching, "_ITSELF_S", 0.2)
    monkeypatch.setattr(watching, "_BEAT_S", 1.0)


def watches(store: Store, of: dict[int, Process]) -> tuple[dict[int, Watch], queue.Queue[str]]:
    ends: queue.Queue[str] = queue.Queue()
    return {rank: Watch(store, rank, of, ends.put) for rank in of if rank < 2}, ends


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_watch_ends_a_rank_whose_mate_died_but_not_when_it_left(child: subprocess.Popen[bytes]) -> None:
    store = Store()
    of = {0: this_process(), 1: this_process(), 2: seen(child)}
    ranks, ends = watches(store, of)
    with pytest.raises(queue.Empty):
        ends.get(timeout=0.5)
    ranks[1].leave()
    child.kill()
    text = ends.get(timeout=5)
    assert text == f"rank 0 ends, for it cannot go on: rank 2 (process {child.pid}) died"
    child.wait()
    store.inner.set("left 2", "yes")
    ranks, ends = watches(store, of)
    with pytest.raises(queue.Empty):
        ends.get(timeout=0.8)
    for one in ranks.values():
        one.leave()


@pytest.mark.usefixtures("quick")
def test_a_watch_hears_why_another_rank_has_ended() -> None:
    ranks, ends = watches(Store(), {0: this_process(), 1: this_process()})
    ranks[1].tell("it ran out of memory")
    assert ends.get(timeout=5) == "rank 0 ends, for it cannot go on: rank 1 has ended: it ran out of memory"


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_watch_does_not_wait_for_a_silent_store() -> None:
    store = Store()
    ranks, ends = watches(store, {0: this_process(), 1: this_process()})
    store.answers.clear()
    texts = sorted([ends.get(timeout=10), ends.get(timeout=10)])
    assert [text[:6] for text in texts] == ["rank 0", "rank 1"]
    assert all("has not answered for 2 s" in text for text in texts)
    store.answers.set()
    for one in ranks.values():
        one.leave()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_rank_of_another_host_is_missed_when_its_beat_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    far = replace(this_process(), place=("another kernel", "pid:[1]"))
    ends: queue.Queue[str] = queue.Queue()
    here = Watch(store, 0, {0: this_process(), 1: far}, ends.put)
    for beat in range(30):  # another host's rank, by hand
        store.inner.set("beat 1", str(beat))
        time.sleep(0.05)
    assert ends.empty()
    assert "rank 1, on another host, has given no sign" in ends.get(timeout=5)
    here.leave()
