"""Whether the orders in which ranks start their collectives, over all groups, could deadlock. Pure.

NCCL's collectives of several groups must be started in one order: a device that is full of kernels which wait for their
peers runs no other, and its peers' may wait for that. The ranks' orders, taken together, must have no cycle.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Key(NamedTuple):
    """A collective as all of its ranks know it: its group's name and ranks, and its number there. A message: from, to,
    and its number between the two."""

    group: str
    ranks: tuple[int, ...]
    number: str


@dataclass(frozen=True, slots=True)
class Launch:
    """What a rank starts at once: a collective, or a batch of messages, with the text and line of each key."""

    keys: tuple[Key, ...]
    texts: tuple[str, ...]
    line: str


Orders = Mapping[int, Sequence[Launch]]
"""Each rank's launches, in its program's order."""


def inversions(orders: Orders) -> list[str]:
    """Cycles of the orders in words, one for each two ranks that have two collectives in opposite orders, or the one
    shortest if it takes more ranks."""
    at = {rank: {key: i for i, one in enumerate(launches) for key in one.keys} for rank, launches in orders.items()}
    found = []
    ranks = sorted(orders)
    for i, first in enumerate(ranks):
        for second in ranks[i + 1 :]:
            if pair := _inverted(at[first], at[second]):
                found.append(_told([(first, *pair), (second, pair[1], pair[0])], orders, at))
    if found:
        return found
    cycle = _cycle(orders)
    return [_told(cycle, orders, at)] if cycle else []


def unmatched(orders: Orders) -> list[tuple[int, str, str, list[int]]]:
    """What some ranks of a group have started and others have not: a rank that has, the text, the line, who has not."""
    had = {rank: {key for one in launches for key in one.keys} for rank, launches in orders.items()}
    found: dict[Key, tuple[int, str, str, list[int]]] = {}
    for rank, launches in orders.items():
        for one in launches:
            for key, text in zip(one.keys, one.texts):
                absent = [other for other in key.ranks if other in had and key not in had[other]]
                if absent and key not in found:
                    found[key] = rank, text, one.line, absent
    return list(found.values())


def _inverted(first: Mapping[Key, int], second: Mapping[Key, int]) -> tuple[Key, Key] | None:
    """Two collectives of both ranks, of which the first starts one before the other, and the second after."""
    last: Key | None = None  # of those that the first rank has started before, what the second comes to last
    both = sorted((key for key in first if key in second), key=lambda key: first[key])
    for _, together in itertools.groupby(both, key=lambda key: first[key]):
        keys = list(together)
        for key in keys:
            if last is not None and second[key] < second[last]:
                return last, key
        last = max([*keys, *([last] if last is not None else [])], key=lambda key: second[key])
    return None


def _cycle(orders: Orders) -> list[tuple[int, Key, Key]]:
    """A shortest cycle of the orders: (rank, what it starts first, what it starts next). Empty if there is none."""
    after: dict[Key, dict[Key, int]] = {}
    for rank, launches in orders.items():
        for before, behind in itertools.pairwise(launches):
            for a in before.keys:
                for b in behind.keys:
                    after.setdefault(a, {}).setdefault(b, rank)
                    after.setdefault(b, {})
    left = _in_cycles(after)
    best: list[tuple[int, Key, Key]] = []
    for start in left:
        came: dict[Key, Key] = {}
        queue = [start]
        while queue and start not in came:
            here = queue.pop(0)
            for there in after[here]:
                if there in left and there not in came:
                    came[there] = here
                    queue.append(there)
        if start not in came:
            continue
        path = [start, came[start]]
        while path[-1] != start:
            path.append(came[path[-1]])
        steps = list(zip(path[:0:-1], path[-2::-1]))
        if not best or len(steps) < len(best):
            best = [(after[a][b], a, b) for a, b in steps]
        if len(left) > 200:
            break  # one cycle is enough of a large tangle
    return _joined(best)


def _in_cycles(after: Mapping[Key, Mapping[Key, int]]) -> set[Key]:
    """What is left when all that nothing left comes before is taken away, again and again."""
    before = dict.fromkeys(after, 0)
    for behind in after.values():
        for key in behind:
            before[key] += 1
    free = [key for key, count in before.items() if not count]
    left = set(after)
    while free:
        key = free.pop()
        left.discard(key)
        for behind_key in after[key]:
            before[behind_key] -= 1
            if not before[behind_key]:
                free.append(behind_key)
    return left


def _joined(steps: list[tuple[int, Key, Key]]) -> list[tuple[int, Key, Key]]:
    """Steps of one rank after each other as one."""
    joined: list[tuple[int, Key, Key]] = []
    for rank, a, b in steps:
        if joined and joined[-1][0] == rank:
            joined[-1] = rank, joined[-1][1], b
        else:
            joined.append((rank, a, b))
    if len(joined) > 1 and joined[0][0] == joined[-1][0]:
        rank, a, _ = joined.pop()
        joined[0] = rank, a, joined[0][2]
    return joined


def _told(cycle: Sequence[tuple[int, Key, Key]], orders: Orders, at: Mapping[int, Mapping[Key, int]]) -> str:
    lines = ["these orders could deadlock, as each rank starts what another one starts later:"]
    for rank, a, b in cycle:
        lines.append(f"    rank {rank}: {_one(a, rank, orders, at)}")
        lines.append(f"        before {_one(b, rank, orders, at)}")
    return "\n".join(lines)


def _one(key: Key, rank: int, orders: Orders, at: Mapping[int, Mapping[Key, int]]) -> str:
    launch = orders[rank][at[rank][key]]
    return f"{launch.texts[launch.keys.index(key)]}, {launch.line}"
