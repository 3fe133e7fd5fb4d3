"""Passes over a list of instructions: communication behind products, and what is no longer needed let go of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from shardgrad.layout.schedule import (
    Accumulate,
    Call,
    Communicate,
    Defer,
    Free,
    InPieces,
    Instruction,
    Instructions,
    Matmul,
    Return,
    Save,
    SumBias,
    Wait,
)


def hide_latency(instructions: Sequence[Instruction]) -> Instructions:
    """Begin every gather one product before the one that reads it, and await every reduction at the end.

    What is awaited where it begins becomes one blocking call.
    """
    ordered = _reduced_first(instructions)
    return tuple(
        replace(one, body=hide_latency(one.body)) if isinstance(one, Defer) else one
        for one in _block(_begin_early(_wait_late(_end_late(ordered))))
    )


def _reduced_first(instructions: Sequence[Instruction]) -> list[Instruction]:
    """dX comes before dW, so that its reduction runs under dW's product; behind it where dW alone is reduced."""
    inputs = {one.phase for one in instructions if isinstance(one, Matmul) and one.role == "lhs"}
    head = [one for one in instructions if one.phase in inputs]
    rest = [one for one in instructions if one.phase not in inputs]
    made = {value for one in head for value in one.writes}
    read = {value for one in rest if not isinstance(one, Return) for value in one.reads}
    if not head or _reduces(head) or not _reduces(rest) or made & read:
        return list(instructions)
    return [*rest[:-1], *head, rest[-1]]


def _reduces(instructions: Sequence[Instruction]) -> bool:
    return any(isinstance(one, Communicate) and one.move.kind != "all-gather" for one in instructions)


def _end_late(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Put behind all products the waits for what they made, and whatever reads that."""
    products = [at for at, one in enumerate(instructions) if _is_product(one)]
    if not products:
        return list(instructions)
    made: set[str] = set()  # by products
    late: set[str] = set()  # not there before the end
    early: list[Instruction] = []
    tail: list[Instruction] = []
    for one in instructions:
        if _is_product(one):
            made.update(one.writes)
        waits_for_product = isinstance(one, Wait) and one.started.src in made
        if waits_for_product or late.intersection(one.reads):
            late.update(one.writes)
            tail.append(one)
        elif isinstance(one, Defer | Save | Return):
            tail.append(one)
        else:
            early.append(one)
    return early + tail


def _wait_late(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Put every wait right before the first instruction that reads what it waits for."""
    pending: dict[str, Wait] = {}
    found: list[Instruction] = []
    for one in instructions:
        at_end = isinstance(one, Save | Defer | Return)  # also of what is not read
        for value in [value for value in pending if at_end or value in one.reads or value in one.writes]:
            found.append(pending.pop(value))
        if isinstance(one, Wait):
            pending[one.started.out] = one
        else:
            found.append(one)
    return found


def _begin_early(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Move the start of every gather of what came from outside one product up; of the first product's, to the top."""
    written: set[str] = set()
    segments: list[tuple[list[Instruction], list[Instruction]]] = [([], [])]  # gathers, and the rest, up to a product
    for one in instructions:
        starts, rest = segments[-1]
        (starts if isinstance(one, Communicate) and one.src not in written else rest).append(one)
        written.update(one.writes)
        if isinstance(one, Matmul) or (isinstance(one, Accumulate) and isinstance(one.value, Matmul)):
            segments.append(([], []))
    found = list(segments[0][0])
    for at, (_, rest) in enumerate(segments):
        ahead = segments[at + 1][0] if at + 1 < len(segments) else []
        first_wait = next((i for i, one in enumerate(rest) if isinstance(one, Wait | Matmul | Accumulate)), len(rest))
        found += [*rest[:first_wait], *ahead, *rest[first_wait:]]
    return found


def _block(instructions: Sequence[Instruction]) -> list[Instruction]:
    found: list[Instruction] = []
    for one in instructions:
        if isinstance(one, Wait) and found and found[-1] is one.started:
            found[-1] = replace(one.started, blocking=True)
        else:
            found.append(one)
    return found


def without_products(instructions: Sequence[Instruction], absent: Collection[int]) -> Instructions:
    """Leave out what is computed for some of the products, none of which communicates: their terms of a sum, and the
    gradients of their weights and biases, whose places among the results stay empty."""
    if not absent:
        return tuple(instructions)
    gone: set[str] = set()
    kept: list[Instruction] = []
    summed: set[str] = set()
    for one in instructions:
        made = one.value if isinstance(one, Accumulate) and isinstance(one.value, Matmul) else one
        if isinstance(made, Matmul | SumBias) and made.index in absent:
            if not (isinstance(made, Matmul) and made.role == "lhs"):  # a sum has other terms
                gone.add(made.out)
        elif isinstance(one, Matmul) and one.role == "lhs":
            kept.append(one if one.out in summed else replace(one, into=None))
            summed.add(one.out)
        elif isinstance(one, Return):
            results = tuple(None if value in gone else value for value in one.results)
            kept.append(replace(one, results=results))
        elif isinstance(one, Defer):
            kept.append(replace(one, body=without_products(one.body, absent)))
        elif not gone.intersection(one.reads):
            kept.append(one)
    return tuple(kept)


def free(instructions: Sequence[Instruction]) -> Instructions:
    """Let go of what was gathered as soon as no later instruction reads it, if there is still something to compute."""
    last: dict[str, int] = {}
    for at, one in enumerate(instructions):
        last.update(dict.fromkeys((*one.reads, *one.writes), at))
    gathered = {
        one.out if isinstance(one, Communicate) else one.started.out
        for one in instructions
        if (isinstance(one, Communicate) and one.blocking) or isinstance(one, Wait)
    }
    computing = [at for at, one in enumerate(instructions) if _is_product(one)]
    found: list[Instruction] = []
    for at, one in enumerate(instructions):
        found.append(replace(one, body=free(one.body)) if isinstance(one, Defer) else one)
        done = tuple(dict.fromkeys(value for value in one.reads if value in gathered and last[value] == at))
        if done and computing and at < computing[-1]:
            found.append(Free(one.phase, done))
    return tuple(found)


def _is_product(one: Instruction) -> bool:
    return isinstance(one, Matmul | SumBias | Accumulate | Call | InPieces)
