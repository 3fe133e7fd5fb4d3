"""Scenes in which something goes wrong on the shm backend; prints what each rank saw, as JSON. See test_shm_failures.

One program, which forks the ranks of each scene, so that torch is imported once.
"""

import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

import shardgrad  # noqa: F401 - registers the backend
from shardgrad.comm.shm import platform

Scene = Callable[[int, int], object]


def ranks(scene: Scene, size: int, timeout: float = 20.0) -> list[object]:
    """What the scene returned on each rank; how the rank ended, where it returned nothing."""
    pids, pipes = [], []
    with tempfile.TemporaryDirectory() as directory:
        for rank in range(size):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                try:
                    store = dist.FileStore(f"{directory}/store", size)
                    said = _said(rank, size, store, timeout, scene)
                except BaseException as error:
                    said = f"{type(error).__name__}: {error}"
                os.write(write, json.dumps(said).encode())
                os._exit(0)
            os.close(write)
            pids.append(pid)
            pipes.append(read)
        texts = []
        for read in pipes:
            with os.fdopen(read) as file:
                texts.append(file.read())
        ends = [os.waitpid(pid, 0)[1] for pid in pids]
    return [json.loads(text) if text else f"ended {end}" for text, end in zip(texts, ends)]


def _said(rank: int, size: int, store: dist.Store, timeout: float, scene: Scene) -> object:
    if scene is never_comes and rank == 1:
        time.sleep(1.5)
        return "stayed away"
    dist.init_process_group("shm", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    said = scene(rank, size)
    if dist.is_initialized():
        dist.destroy_process_group()
    return said


def attempt(call: Callable[[], object]) -> list[object]:
    """The error that a call raised, and after how many seconds."""
    start = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        return [type(error).__name__, str(error), time.monotonic() - start]
    return ["nothing", "", time.monotonic() - start]


def tell(rank: int) -> None:
    """Let the others go on that wait for this rank, by the store and not by the clock."""
    dist.distributed_c10d._get_default_store().set(f"told by {rank}", "")


def hear(*ranks: int) -> None:
    dist.distributed_c10d._get_default_store().wait([f"told by {rank}" for rank in ranks])


def never_comes(rank: int, size: int) -> object:
    return "met"


def dies(rank: int, size: int) -> object:
    dist.all_reduce(torch.ones(3))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return [attempt(lambda: dist.all_reduce(torch.ones(5))), attempt(lambda: dist.barrier())]


def dies_while_others_hold_futures(rank: int, size: int) -> object:
    if rank == 1:
        hear(0, 2)
        os.kill(os.getpid(), signal.SIGKILL)
    future = dist.all_reduce(torch.ones(400_000), async_op=True).get_future()
    tell(rank)
    return attempt(future.wait)


def dies_at_a_random_moment(rank: int, size: int) -> object:
    chance = random.Random(os.getpid())
    if rank == 1:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.1))

    def forever() -> None:
        together = random.Random(7)
        while True:
            n = together.choice([1, 1000, 300_000])
            x = torch.full((n,), rank + 1.0)
            if together.random() < 0.5:
                dist.all_reduce(x)
            else:
                dist.all_gather([torch.empty(n) for _ in range(size)], x)

    error = attempt(forever)
    return error


def late(rank: int, size: int) -> object:
    if rank == 1:
        hear(0, 2)
        return attempt(lambda: dist.all_reduce(torch.ones(5)))
    errors = [attempt(lambda: dist.all_reduce(torch.ones(5))) for _ in range(2)]
    tell(rank)
    return errors


def shorter_wait(rank: int, size: int) -> object:
    if rank == 1:
        hear(0)
        return "stayed away"
    work = dist.all_reduce(torch.ones(5), async_op=True)
    error = attempt(lambda: work.wait(timedelta(seconds=0.2)))
    tell(rank)
    return error


def nobody_sends(rank: int, size: int) -> object:
    if rank == 1:
        hear(0)
        return "stayed away"
    error = attempt(lambda: dist.recv(torch.ones(5), 1, tag=6))
    tell(rank)
    return error


def leaves(rank: int, size: int) -> object:
    dist.barrier()
    if rank == 1:
        dist.destroy_process_group()
        time.sleep(0.5)  # left, but alive
        return "left"
    return attempt(lambda: dist.all_reduce(torch.ones(5)))


def own_work_is_lost(rank: int, size: int) -> object:
    if rank == 1:
        hear(0)
        return "stayed away"
    work = dist.all_reduce(torch.ones(5), async_op=True)
    tell(rank)
    dist.destroy_process_group()
    return attempt(work.wait)


def other(first: Callable[[], object], second: Callable[[], object]) -> Scene:
    return lambda rank, size: attempt(second if rank == 1 else first)


DISAGREE = {
    "operation": other(lambda: dist.all_reduce(torch.ones(5)), lambda: dist.broadcast(torch.ones(5), 0)),
    "elements": other(lambda: dist.all_reduce(torch.ones(5)), lambda: dist.all_reduce(torch.ones(6))),
    "dtype": other(lambda: dist.all_reduce(torch.ones(5)), lambda: dist.all_reduce(torch.ones(5).int())),
    "reduction": other(
        lambda: dist.all_reduce(torch.ones(5)), lambda: dist.all_reduce(torch.ones(5), dist.ReduceOp.MAX)
    ),
    "root": other(lambda: dist.broadcast(torch.ones(5), 0), lambda: dist.broadcast(torch.ones(5), 1)),
    "rounds": other(lambda: dist.all_reduce(torch.ones(5)), lambda: dist.all_reduce(torch.ones(900_000))),
    "splits": other(
        lambda: dist.all_to_all_single(torch.ones(5), torch.ones(5), [2, 3], [2, 3]),
        lambda: dist.all_to_all_single(torch.ones(5), torch.ones(5), [1, 4], [1, 4]),
    ),
    "message": other(lambda: dist.send(torch.ones(5), 1), lambda: dist.recv(torch.ones(6), 0)),
}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def maps() -> int:
    with open("/proc/self/maps") as file:
        return sum("shardgrad-shm" in line for line in file)


def many_groups(rank: int, size: int) -> object:
    dist.barrier()
    before = open_files(), maps()
    for _ in range(20):
        group = dist.new_group()
        x = torch.ones(100_000)
        dist.all_reduce(x, group=group)
        assert x[-1] == size
        dist.destroy_process_group(group)
        del group
    return [*before, open_files(), maps()]


def twice(rank: int, size: int) -> object:
    """All again in the same store, whose keys of the first time are still there."""
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("shm", store=store, rank=rank, world_size=size)
    x = torch.ones(3)
    dist.all_reduce(x)
    return x.tolist()


def descriptors(rank: int, size: int) -> object:
    """How others could reach the memory."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [link for link in links if "shardgrad" in link]


def no_memory(rank: int, size: int) -> object:
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    return attempt(lambda: dist.new_group())


def other_processor(rank: int, size: int) -> object:
    platform.platform.machine = lambda: "aarch64"  # type: ignore[attr-defined]
    return attempt(lambda: dist.new_group())


def main() -> None:
    before = os.listdir("/dev/shm")
    found: dict[str, object] = {
        "never_comes": ranks(never_comes, 3, timeout=1.0),
        "dies": ranks(dies, 3),
        "dies_while_others_hold_futures": ranks(dies_while_others_hold_futures, 3),
        "late": ranks(late, 3, timeout=0.8),
        "shorter_wait": ranks(shorter_wait, 2),
        "nobody_sends": ranks(nobody_sends, 2, timeout=0.8),
        "leaves": ranks(leaves, 3),
        "own_work_is_lost": ranks(own_work_is_lost, 2),
        "many_groups": ranks(many_groups, 2),
        "twice": ranks(twice, 2),
        "descriptors": ranks(descriptors, 2),
        "no_memory": ranks(no_memory, 1),
        "other_processor": ranks(other_processor, 1),
    }
    for name, scene in DISAGREE.items():
        found[name] = ranks(scene, 2)
    found["random"] = [ranks(dies_at_a_random_moment, 3) for _ in range(6)]
    found["left in /dev/shm"] = sorted(set(os.listdir("/dev/shm")) - set(before))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
