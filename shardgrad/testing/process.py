"""One rank's process, seen from the process that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from .excerpt import excerpt_of_file
from .messages import Task

_BOOT = (
    "import sys; from multiprocessing.connection import Connection; pipe = Connection(int(sys.argv[1])); "
    "sys.path[:] = pipe.recv(); from shardgrad.testing.worker import main; main(pipe, *sys.argv[2:])"
)
"""The import path comes first, so that a rank imports the very shardgrad and torch that its parent would."""


class RankProcess:
    """Started at once, ready when its first message has arrived.

    A fresh interpreter, never a fork: gloo's threads do not survive one. Not ``multiprocessing.Process``
    either, which would run the caller's main module again and start one more process to track resources. The
    rank leads a session of its own, so that Ctrl-C reaches the caller alone and what a test started can be
    killed with the rank.
    """

    def __init__(self, rank: int, directory: Path) -> None:
        self._streams = [directory / f"rank{rank}.{name}" for name in ("stdout", "stderr")]
        self._stacks = directory / f"rank{rank}.stacks"
        self._stacks.write_bytes(b"")
        self.connection: Connection[Any, Any]
        self.connection, theirs = Pipe()
        with theirs, contextlib.ExitStack() as files:
            # Append, so that the files can be emptied between tests while the rank has them open.
            out, err = (files.enter_context(open(path, "ab")) for path in self._streams)
            descriptor = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, str(descriptor), str(directory), str(rank)],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=_environment(),
                start_new_session=True,
            )
        self.connection.send(list(sys.path))

    def exit_code(self, patience: float = 0.0) -> int | None:
        """None while the process runs, which it may for ``patience`` seconds more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        return self._process.returncode

    def how_it_died(self) -> str:
        code = self.exit_code(patience=5.0)
        if code is None:
            return "closed its pipe and went on"
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def send(self, task: Task | None) -> None:
        """Gives the rank a task; None ends it. If it is dead, that shows when its reply is awaited."""
        with contextlib.suppress(OSError):
            self.connection.send(task)

    def request_stacks(self) -> None:
        os.truncate(self._stacks, 0)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)

    def stacks(self) -> str:
        """What faulthandler has written: after ``request_stacks``, or as the rank crashed."""
        return self._stacks.read_text(errors="replace")

    def take_output(self) -> tuple[str, str]:
        """What the rank has written to stdout and stderr since the last call; of very much, the ends."""
        texts = [excerpt_of_file(path) for path in self._streams]
        for path in self._streams:
            os.truncate(path, 0)
        return texts[0], texts[1]

    def kill(self) -> None:
        """Ends the process, if it has not ended, and what tests have left in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()


def _environment() -> dict[str, str]:
    """One thread a rank, and gloo on the loopback interface unless the caller chose one."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    interfaces = [name for _, name in socket.if_nameindex()]
    for loopback in ("lo", "lo0"):
        if loopback in interfaces:
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return environment
