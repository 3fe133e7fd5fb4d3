"""A collective that failed, or will never end: which ranks are still there, and what each was doing.

The group itself is broken by then, so the survivors meet in the key-value store of the default process group.
"""

from __future__ import annotations

import time

from shardgrad.comm import shim
from shardgrad.comm.ask import SilentStore, StoreError, ask
from shardgrad.comm.comparison import passed_by
from shardgrad.comm.mesh import Axis
from shardgrad.comm.standing import BRIEFLY_S
from shardgrad.errors import CollectiveError, DisagreementError

PATIENCE = 5.0  # seconds that the survivors give each other to report
_HINT = (
    "A rank that died, that raised before this operation, or that came here with another layout or shape leaves the "
    "others waiting; run the block under sg.check_every_call() to compare layouts and shapes at every call."
)


def failure(what: str, axis: Axis, error: BaseException) -> CollectiveError | DisagreementError:
    """What to raise for a collective that failed."""
    begins = f"rank {axis.standing.rank}: {what} over {axis} failed: {str(error).strip()}"
    try:
        if disagreement := passed_by(axis, what, BRIEFLY_S):
            return disagreement
        said = _reports(what, axis)
    except StoreError as lost:
        return CollectiveError(f"{begins}\n  {axis.standing.trouble() or lost}")
    return CollectiveError(f"{begins}\n{said}\n{_HINT}")


def hopeless(what: str, axis: Axis) -> CollectiveError | DisagreementError | None:
    """What to raise for a collective that this rank has long waited for; None while it may still end."""
    standing = axis.standing
    why = standing.trouble()
    if not why:
        try:
            disagreement = passed_by(axis, what, BRIEFLY_S)
            standing.heard(True)
            return disagreement
        except SilentStore as silent:
            why = "" if standing.heard(False) else str(silent)
        except StoreError as lost:
            why = str(lost)
    return CollectiveError(f"rank {standing.rank}: {what} over {axis} cannot end: {why}") if why else None


def _reports(what: str, axis: Axis) -> str:
    """A line for each other rank of the axis: in which operation it failed, that it died, or that it does not answer.

    Raises:
        StoreError: the store does not answer, or is gone.
    """
    standing = axis.standing
    key = f"shardgrad/failed/{standing.name}/{standing.begun}"
    dead = standing.trouble()

    def exchange() -> dict[int, str]:
        store = shim.store()
        store.set(f"{key}/{standing.rank}", what)
        said: dict[int, str] = {}
        deadline = time.monotonic() + (PATIENCE if not dead else 0.0)
        while True:
            for rank in standing.others:
                if rank not in said and store.check([f"{key}/{rank}"]):
                    said[rank] = store.get(f"{key}/{rank}").decode()
            if len(said) == len(standing.others) or time.monotonic() > deadline:
                return said
            time.sleep(0.05)

    said = ask(exchange, PATIENCE + BRIEFLY_S)
    lines = [f"  {dead}"] if dead else []
    for rank in standing.others:
        if rank in said:
            lines.append(f"  rank {rank} failed in: {said[rank]}")
        elif not dead:
            lines.append(f"  rank {rank} does not answer (within {PATIENCE:.0f} s): it died, or is busy elsewhere")
    return "\n".join(("The other ranks of the axis:", *lines))
