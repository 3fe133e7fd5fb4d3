"""Ranks killed and stopped at random moments: the others must end within `WITHIN_S`, and name the rank."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from shardgrad.chaos.tally import Row, Tally
from shardgrad.comm.processes import ENDED, stat

Backend = Literal["gloo", "shm"]
How = Literal["killed", "stopped"]
What = Literal["train", "layers"]

WITHIN_S = 30.0
_GIVEN_UP_S = 90.0
_SHOWN = 2_000  # characters of what ranks wrote, of an attack that did not hold
_CONFIG = """\
run: {dir: FOLDER/run, seed: 0}
model: {layers: 1, heads: 2, d_model: 16, seq_len: 16}
train: {steps: 100000, batch: 4, lr: 1e-3, warmup: 1, log_every: 1000000, eval_every: 1000000, save_every: 50}
sample: {tokens: 0}
"""


@dataclass(frozen=True)
class Attack:
    """after: seconds from the start of the ranks. agent: whether torchrun starts them, and keeps their store."""

    how: How
    rank: int
    ranks: int
    backend: Backend
    what: What
    agent: bool
    after: float

    def __str__(self) -> str:
        by = "by torchrun" if self.agent else "without torchrun"
        where = f"{self.what} on {self.ranks} ranks, {self.backend}, {by}"
        return f"{where}: rank {self.rank} {self.how} after {self.after:.1f} s"


@dataclass(frozen=True)
class Outcome:
    """seconds: from the attack until the last survivor had ended; None if one had not in 90 s. named: whether what
    survivors wrote names the rank. text: what all ranks wrote."""

    attack: Attack
    seconds: float | None
    named: bool
    text: str

    @property
    def held(self) -> bool:
        return self.seconds is not None and self.seconds <= WITHIN_S and self.named


def attacks(seed: int, count: int, most_ranks: int = 3) -> Iterator[Attack]:
    """So many attacks, the same for a seed. The moments lie in the start of the ranks as well as in their steps."""
    chance = random.Random(seed)
    for _ in range(count):
        ranks = chance.randint(2, most_ranks)
        yield Attack(
            chance.choice(get_args(How)),
            chance.choice([0, chance.randrange(ranks)]),
            ranks,
            chance.choice(get_args(Backend)),
            chance.choice(get_args(What)),
            chance.random() < 0.5,
            chance.choice([chance.uniform(1, 5), chance.uniform(5, 12)]),
        )


def run(seed: int, count: int, most_ranks: int = 3) -> list[Row]:
    """Carry out so many attacks, the same for a seed, one after another."""
    tally = Tally()
    for attack in attacks(seed, count, most_ranks):
        outcome = carry_out(attack)
        took = "had not ended after 90 s" if outcome.seconds is None else f"ended after {outcome.seconds:.1f} s"
        said = "" if outcome.named else ", and did not name it"
        kind = f"{attack.how}, {attack.backend}, {'with' if attack.agent else 'without'} torchrun"
        tally.note(kind, None if outcome.held else f"{attack}: the others {took}{said}\n{outcome.text[-_SHOWN:]}")
    return tally.rows


def carry_out(attack: Attack) -> Outcome:
    """Start the ranks, attack one, and see what becomes of the others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(_CONFIG.replace("FOLDER", name))
        started = _start(attack, folder)
        try:
            return _attacked(attack, folder)
        finally:
            for pid in [*_pids(folder, attack.ranks).values(), *(one.pid for one in started)]:
                _send(pid, signal.SIGKILL)
            for one in started:
                one.wait()


def _attacked(attack: Attack, folder: Path) -> Outcome:
    time.sleep(attack.after)
    while attack.rank not in (pids := _pids(folder, attack.ranks)):
        time.sleep(0.05)
    _send(pids[attack.rank], signal.SIGKILL if attack.how == "killed" else signal.SIGSTOP)
    began = time.monotonic()
    seconds = None
    while time.monotonic() - began < _GIVEN_UP_S:
        pids = _pids(folder, attack.ranks)
        lives = [rank for rank, pid in pids.items() if rank != attack.rank and stat(pid)[0] not in ENDED]
        if len(pids) == attack.ranks and not lives:
            seconds = time.monotonic() - began
            break
        time.sleep(0.1)
    texts = {path.stem: path.read_text(errors="replace") for path in sorted(folder.glob("*.out"))}
    text = "\n".join(f"[{name}]\n{said}" for name, said in texts.items())
    return Outcome(attack, seconds, named(attack.rank, text), text)


def _start(attack: Attack, folder: Path) -> list[subprocess.Popen[bytes]]:
    program = ["-m", "shardgrad.chaos.program", str(folder), attack.backend, attack.what]
    program += [str(folder / "config.yaml")] if attack.what == "train" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if attack.agent:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={attack.ranks}"]
        with (folder / "all ranks.out").open("wb") as out:
            command = [sys.executable, *torchrun, *program]
            return [subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(attack.ranks)}
    started = []
    for rank in range(attack.ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(attack.ranks)}
        own = {**environment, **where, **place}
        with (folder / f"rank {rank}.out").open("wb") as out:
            command = [sys.executable, *program]
            started.append(subprocess.Popen(command, stdout=out, stderr=out, env=own, start_new_session=True))
    return started


def named(rank: int, text: str) -> bool:
    """Whether what ranks wrote says of this one that it died, is stopped, or has not come."""
    own = rf"rank {rank} \(process \d+\) (died|has been stopped|came, and does not answer)"
    store = rf"which rank {rank} \(.*\) keeps, (is gone|has not answered|within)"
    missing = (
        rf"rank {rank} (did not answer|never came|has left)|ranks [\d, ]*\b{rank}\b[\d, ]* (never came|did not come)"
    )
    agent = rf"exitcode: -9\) local_rank: {rank} "  # what torchrun says, which ends the others at once
    return re.search(f"{own}|{store}|{missing}|{agent}", text) is not None


def _pids(folder: Path, ranks: int) -> dict[int, int]:
    """Of the ranks that have begun."""
    found = {}
    for rank in range(ranks):
        path = folder / f"{rank}.pid"
        if path.exists() and (text := path.read_text()):
            found[rank] = int(text)
    return found


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
