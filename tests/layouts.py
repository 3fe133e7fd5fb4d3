"""Random legal layouts, and sizes that divide by nothing. Shared by the tests."""

from __future__ import annotations

import random

from shardgrad import Layout

Placement = dict[str, list[str]]  # letter -> axes


def random_layout(rng: random.Random, axes: tuple[str, ...], bias: bool = True, marks: bool = True) -> Layout:
    """A legal layout that mentions some or all of the axes, in letters, roles, orders and storage drawn at random."""
    pool = list("abcdefghijk")
    rng.shuffle(pool)
    roles = {role: [pool.pop() for _ in range(rng.choice(n))] for role, n in _COUNTS.items()}
    letters = {
        "X": [*roles["batched"], *roles["rows"], *roles["contracted"]],
        "W": [*roles["batched"], *roles["contracted"], *roles["columns"]],
        "Y": [*roles["batched"], *roles["rows"], *roles["columns"]],
    }
    for order in letters.values():
        rng.shuffle(order)
    splitting: dict[str, list[str]] = {letter: [] for group in letters.values() for letter in group}
    storing: dict[str, Placement] = {name: {letter: [] for letter in order} for name, order in letters.items()}
    marked: dict[str, list[str]] = {name: [] for name in letters}
    shuffled = rng.sample(axes, len(axes))
    for axis in shuffled:
        if not splitting or rng.random() < 0.1:
            continue
        letter = rng.choice(sorted(splitting))
        splitting[letter].append(axis)
        for name, order in letters.items():
            if letter in order:
                continue
            draw = rng.random()
            if order and draw < 0.5:
                storing[name][rng.choice(order)].append(axis)
            elif marks and draw < 0.6:
                marked[name].append(axis)

    def dim(name: str, letter: str) -> str:
        return "/".join([letter, *splitting[letter], *storing[name][letter]])

    def tensor(name: str) -> str:
        mark = f"{{{','.join(marked[name])}}}" if marked[name] else ""
        return f"{name}[{','.join(dim(name, letter) for letter in letters[name])}]{mark}"

    text = f"{tensor('X')} {tensor('W')} -> {tensor('Y')}"
    if bias and rng.random() < 0.6:
        text += f" + {_bias(rng, letters['Y'], splitting, storing['Y'], axes)}"
    return Layout(text)


_COUNTS = {"batched": (0, 0, 1), "rows": (0, 1, 1, 2), "contracted": (0, 1, 1, 2), "columns": (0, 1, 1, 2)}


def _bias(rng: random.Random, y: list[str], splitting: Placement, storing: Placement, axes: tuple[str, ...]) -> str:
    """A bias on some of Y's letters: stored as Y is, or on other axes that the layout has."""
    chosen = rng.sample(y, rng.randint(0, len(y)))
    used = sorted({axis for placed in splitting.values() for axis in placed})
    free = rng.sample(used, len(used))
    dims = []
    for letter in chosen:
        own = [*splitting[letter], *storing[letter]]
        if rng.random() < 0.6:
            keep = [axis for axis in own if axis in free][: rng.randint(0, len(own))]
        else:
            keep = [free[0]] if free and rng.random() < 0.7 else []
        free = [axis for axis in free if axis not in keep]
        dims.append("/".join([letter, *keep]))
    stored = "/".join(dims).split("/")
    summed = [axis for letter in y if letter not in chosen for axis in (*splitting[letter], *storing[letter])]
    marks = [axis for axis in summed if axis not in stored and rng.random() < 0.3]
    return f"B[{','.join(dims)}]" + (f"{{{','.join(marks)}}}" if marks else "")


def random_sizes(rng: random.Random, layout: Layout) -> dict[str, int]:
    """Small sizes, different from each other where that can be, sometimes empty."""
    sizes = rng.sample(range(1, 10), len(layout.letters)) if len(layout.letters) < 9 else [2] * len(layout.letters)
    return {letter: 0 if rng.random() < 0.04 else size for letter, size in zip(layout.letters, sizes)}


def grids(ranks: int, dims: int) -> list[tuple[int, ...]]:
    """Every way to arrange the ranks in a grid of so many dims."""
    if dims == 0:
        return [()] if ranks == 1 else []
    return [
        (first, *rest)
        for first in range(1, ranks + 1)
        if ranks % first == 0
        for rest in grids(ranks // first, dims - 1)
    ]
