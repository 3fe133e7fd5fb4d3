"""What the ranks of an axis say, compared through the store of the default process group.

Not by a collective: where one rank compares and the others, to which nothing seems new, have gone on, the comparison
would meet a collective of tensors, of another size perhaps, and gloo ends the process there. A rank that waits for the
others in a collective looks, from time to time, whether one of them waits for it in a comparison that it has passed by;
then it says so, and both know that they disagree.
"""

from __future__ import annotations

import json
import time
from typing import Any

from shardgrad.comm import shim
from shardgrad.comm.ask import SILENT_S, Question, StoreError, ask, silent_store
from shardgrad.comm.mesh import Axis
from shardgrad.comm.standing import Standing
from shardgrad.errors import CollectiveError, DisagreementError

SLICE_S = 2.0
"""How long a rank waits for others before it looks whether they can still come, and again."""

_LAST_S = 0.5  # for what a rank had written before it died
_SOON_S = 1.0
_PAUSES_S = 0.0002, 0.001, 0.02  # between questions: the first, the longest of the first second, the longest


def compare(axis: Axis, text: str, value: int, what: str) -> tuple[list[str], int]:
    """The texts of all ranks, in the order of the axis, and the first rank's value. Called by all of them.

    Raises:
        DisagreementError: another rank has begun a collective that comes after this comparison.
        CollectiveError: a rank died or has been stopped, or did not come within the group's timeout.
    """
    standing = axis.standing
    standing.compared += 1
    question = Question(lambda question: _exchange(question, standing, text, value, what))
    began = time.monotonic()
    failed = f"rank {standing.rank}: the comparison of {what} over {axis} cannot end: "
    try:
        while not question.wait(SLICE_S):
            if (trouble := standing.trouble()) and not question.wait(_LAST_S):
                raise CollectiveError(f"{failed}{trouble}")
            if time.monotonic() - question.heard > SILENT_S:
                raise StoreError(failed + silent_store(SILENT_S))
            if time.monotonic() - began > standing.timeout:
                raise CollectiveError(f"{failed}a rank did not come to it within {standing.timeout:g} s")
    finally:
        question.given_up = True
    found = question.answer
    if "passed by" in found:
        raise DisagreementError(f"the ranks of {axis} disagree about {what}:\n{found['passed by']}")
    standing.learn()
    said = found["said"]
    return said if len(said) > 1 else said * len(standing.ranks), found["value"]


def passed_by(axis: Axis, what: str, seconds: float) -> DisagreementError | None:
    """The error of a rank that another waits for in a comparison which comes before the collective that this one has
    begun; None if there is nothing of the kind.

    Raises:
        StoreError: the store does not answer within so many seconds, or is gone.
    """
    found = ask(lambda: _passed_by(axis.standing, what), seconds)
    return found and DisagreementError(f"the ranks of {axis} disagree about {found[0]}:\n{found[1]}")


def _exchange(question: Question[Any], standing: Standing, text: str, value: int, what: str) -> dict[str, Any]:
    """What the first rank has written when all had come: what they `said`, once if it was the same, and its `value`; or
    what a rank has written that has `passed by`."""
    store, at, size = shim.store(), standing.compared, len(standing.ranks)
    key, together = _key(standing, at), _result(standing, at)
    latest = {"at": at, "begun": standing.begun, "rank": standing.rank, "what": what, "text": text}
    store.set(_latest(standing), json.dumps(latest))
    said = {standing.index: text}
    if standing.index:
        store.set(f"{key}/{standing.index}", text)
    pause, began = _PAUSES_S[0], time.monotonic()
    while not store.check([together]):
        if question.given_up:
            return {}
        if standing.index == 0:
            for index in range(size):
                if index not in said and store.check([f"{key}/{index}"]):
                    said[index] = store.get(f"{key}/{index}").decode()
                    store.delete_key(f"{key}/{index}")
            if len(said) == size:
                texts = [said[index] for index in range(size)] if len(set(said.values())) > 1 else [text]
                store.compare_set(together, "", json.dumps({"said": texts, "value": value}))
                if at > 1:  # all are here, so all have read the one before
                    store.delete_key(_result(standing, at - 1))
                    store.delete_key(f"{_key(standing, at - 1)}/read")
                continue
        question.heard = time.monotonic()
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES_S[1] if question.heard - began < _SOON_S else _PAUSES_S[2])
    found: dict[str, Any] = json.loads(store.get(together))
    if standing.ranks[0] == 0 and "said" in found:
        # Rank 0, which may keep the store in its own process, must not end before the others have read.
        if standing.index:
            store.add(f"{key}/read", 1)
        while standing.index == 0 and store.add(f"{key}/read", 0) < size - 1 and not question.given_up:
            question.heard = time.monotonic()
            time.sleep(_PAUSES_S[0])
    return found


def _passed_by(standing: Standing, what: str) -> tuple[str, str] | None:
    """What is compared, and what both ranks do instead of the same."""
    store = shim.store()
    if not store.check([_latest(standing)]):
        return None
    latest = json.loads(store.get(_latest(standing)))
    if latest["at"] <= standing.compared or latest["begun"] >= standing.begun:
        return None
    lines = "\n    ".join(latest["text"].splitlines())
    said = (
        f"  rank {latest['rank']} compares what it has not seen before:\n    {lines}\n"
        f"  rank {standing.rank} has seen what it does before, and has begun: {what}"
    )
    written = store.compare_set(_result(standing, latest["at"]), "", json.dumps({"passed by": said}))
    found = json.loads(written)
    return (latest["what"], found["passed by"]) if "passed by" in found else None


def _key(standing: Standing, at: int) -> str:
    return f"shardgrad/compare/{standing.name}/{at}"


def _result(standing: Standing, at: int) -> str:
    return f"{_key(standing, at)}/result"


def _latest(standing: Standing) -> str:
    return f"shardgrad/compare/{standing.name}/latest"
