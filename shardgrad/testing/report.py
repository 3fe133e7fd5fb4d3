"""From the replies of all ranks to one verdict, and a text that leads with the likeliest cause."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

from shardgrad.errors import shorten

from .excerpt import excerpt
from .messages import Reply
from .stack import read_stacks

_ADDRESS = re.compile(r"\b0x[0-9a-f]+")

Verdict = Literal["passed", "skipped", "xfailed", "failed"]


def judge(replies: Sequence[Reply], timeout: float) -> tuple[Verdict, str]:
    """What became of the test, and why. Ranks must agree to skip or to xfail."""
    first = replies[0]
    if first.status in ("passed", "skipped", "xfailed") and all(r.status == first.status for r in replies):
        return first.status, excerpt(first.summary)
    sections = itertools.chain(
        _died_sections(replies), _failed_sections(replies), _stuck_sections(replies), _other_lines(replies)
    )
    return "failed", "\n".join([_headline(replies, timeout), *sections])


def echo(replies: Sequence[Reply]) -> None:
    """Prints what the ranks printed, each line with its rank; pytest captures it as the test's own."""
    for rank, reply in enumerate(replies):
        for text, stream in ((reply.stdout, sys.stdout), (reply.stderr, sys.stderr)):
            for line in text.splitlines():
                print(f"[rank {rank}] {line}", file=stream)


def name_ranks(ranks: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` is ``ranks 0-2, 5``; the argument is in order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' * (len(runs) > 1 or len(runs[0]) > 1)} {text}"


def _having(replies: Sequence[Reply], status: str) -> list[int]:
    return [rank for rank, reply in enumerate(replies) if reply.status == status]


def _headline(replies: Sequence[Reply], timeout: float) -> str:
    size = len(replies)
    if died := _having(replies, "died"):
        return f"{name_ranks(died)} of {size} died: {replies[died[0]].summary}"
    if failed := _having(replies, "failed"):
        first = min(failed, key=lambda rank: replies[rank].when)
        cause = shorten(replies[first].summary, 500)
        return f"{len(failed)} of {size} ranks failed, {'first ' * (len(failed) > 1)}rank {first}: {cause}"
    skipped = _having(replies, "skipped") + _having(replies, "xfailed")
    if skipped:
        return f"the ranks disagree: {name_ranks(sorted(skipped))} of {size} skipped or xfailed, not all"
    stuck = _having(replies, "stuck")
    return f"timeout: {len(stuck)} of {size} ranks ({name_ranks(stuck)}) did not finish in {timeout:g} s"


def _died_sections(replies: Sequence[Reply]) -> Iterable[str]:
    for rank in _having(replies, "died"):
        yield _rule(f"rank {rank} died: {replies[rank].summary}")
        if replies[rank].traceback:
            yield read_stacks(replies[rank].traceback)[1]


def _failed_sections(replies: Sequence[Reply]) -> Iterable[str]:
    """One section for each different traceback, the first failure first; locals by rank if they differ."""
    alike: dict[str, list[int]] = {}
    for rank in sorted(_having(replies, "failed"), key=lambda rank: replies[rank].when):
        alike.setdefault(_ADDRESS.sub("", replies[rank].traceback), []).append(rank)
    for ranks in alike.values():
        yield _rule(f"{name_ranks(sorted(ranks))} failed")
        yield excerpt(replies[ranks[0]].traceback.rstrip())
        variables: dict[str, list[int]] = {}
        for rank in sorted(ranks):
            variables.setdefault(replies[rank].variables, []).append(rank)
        for values, same in variables.items():
            if values:
                yield f"locals of {name_ranks(same)}:\n{excerpt(values)}"


def _stuck_sections(replies: Sequence[Reply]) -> Iterable[str]:
    alike: dict[tuple[str, str], list[int]] = {}
    for rank in _having(replies, "stuck"):
        alike.setdefault(read_stacks(replies[rank].traceback), []).append(rank)
    for (place, stacks), ranks in alike.items():
        verb = "was" if len(ranks) == 1 else "were"
        yield _rule(f"{name_ranks(ranks)} {verb} still {f'in {place}' if place else 'running: no stack'}")
        if stacks:
            yield stacks


def _other_lines(replies: Sequence[Reply]) -> Iterable[str]:
    passed = _having(replies, "passed")
    lines = [f"{name_ranks(passed)} finished: passed"] if passed else []
    for rank, reply in enumerate(replies):
        if reply.status in ("skipped", "xfailed"):
            lines.append(f"rank {rank} finished: {reply.status} ({shorten(reply.summary, 500)})")
    if lines:
        yield _rule("the other ranks")
        yield from lines


def _rule(title: str) -> str:
    return f"\n{f' {title} ':-^100}"
