"""Start the ranks of a command: the same command line, once a rank, by torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn

import typer

from shardgrad.cli import style

if TYPE_CHECKING:
    from shardgrad.train.config import Config

_STATUS = "SHARDGRAD_STATUS_FILE"


_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def inside() -> bool:
    """Whether this process is one of several that torchrun, or another launcher, started."""
    return "TORCHELASTIC_RUN_ID" in os.environ or all(name in os.environ for name in _LAUNCHED)


def count() -> int | None:
    """How many ranks the launcher started; None outside."""
    return int(os.environ["WORLD_SIZE"]) if inside() else None


def start(ranks: int) -> None:
    """Run this very command line on so many ranks of this machine, and end with its status.

    Returns at once on a rank that torchrun has started: the command then goes on as that rank.
    """
    if inside():
        return
    with TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        os.environ[_STATUS] = str(status_file)
        torchrun(ranks, "shardgrad", *sys.argv[1:])
        status = int(status_file.read_text()) if status_file.exists() else 0
    raise typer.Exit(status)


def torchrun(ranks: int, *program: str) -> None:
    """Run a module with its arguments on so many ranks of this machine, and return once all have ended with status 0.

    Torch's launcher runs in this process: signals reach it, and it passes them on and waits for its ranks.

    Raises:
        typer.Exit: 128 + a signal's number; 1, with torch's words, if a rank failed.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        run.main(["--standalone", f"--nproc-per-node={ranks}", "-m", *program])
    except SignalException as stopped:
        raise typer.Exit(128 + stopped.sigval) from None
    except ChildFailedError as failed:
        typer.echo(str(failed), err=True)
        raise typer.Exit(1) from None


def configured(config: str, overrides: list[str] | None, ranks: int | None) -> tuple[Config, int]:
    """A training configuration, and its ranks: the launcher's, as many as asked for, or as the mesh needs.

    Nothing of torch is imported, which takes seconds: a wrong key need not wait for it.

    Raises:
        typer.Exit: it cannot be used on so many.
    """
    from shardgrad.train.config import ConfigError, check_ranks, default_ranks, load

    with style.exit_on(ConfigError):
        read = load(config, overrides or [])
        ranks = count() or ranks or default_ranks(read.mesh)
        return check_ranks(read, ranks, by_option=True), ranks


@contextmanager
def joined() -> Iterator[bool]:
    """The ranks of a command as one gloo group, which is left at the end; whether this rank is the first."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """End a rank's command with a status that all ranks have found.

    torchrun takes a rank that ends with another status than 0 for one that failed, and says so at length; `start`
    passes this one on instead.
    """
    if _STATUS in os.environ:
        if os.environ["RANK"] == "0":
            Path(os.environ[_STATUS]).write_text(str(status))
        status = 0
    raise typer.Exit(status)
