"""Explanations by one device that does something otherwise: another function, another constant, other positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.verification.functions import TIMES, Applied, Call, Change, Instead, Noted, NotThis, Slot, Which, calling
from shardgrad.verification.hypothesis import Context, Evidence, Hypothesis, list_of
from shardgrad.verification.reruns import earlier
from shardgrad.verification.variants import VARIANTS, Variant

_CONSTANTS = 10
"""Constants to try at most; those next to the tensor."""
_NEAR, _ROUNDER = 1e-4, 0.02
"""How near a number must be to one that is easier to read."""
_LEAST = 8
"""Elements that a tensor needs so that a constant can be fitted to it."""
_ALIKE = 0.25
"""Cosine between what a constant changes and what is wrong, from which on the constant is fitted."""


def _window(seen: Evidence, known: Context) -> tuple[list[Noted], list[Noted]]:
    """The calls between the last right output and the wrong one, and those before."""
    if seen.kind not in ("output", "loss") or not seen.fits:
        return [], []
    watch = known.watch()
    name = known.single.get((seen.kind, seen.name), (seen.kind, seen.name))[1]
    right = [
        known.single.get(key, key)[1] for key in known.exact if key[0] == "output" and key not in known.wrong
    ]  # fmt: skip
    start, end = earlier(name, watch.outputs, right), watch.outputs.get(name, len(watch.calls))
    return watch.calls[start:end], watch.calls[:start]


def other_functions(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Another function of the table in the place of one that stands before the tensor."""
    near, far = _window(seen, known)
    for variant in VARIANTS:
        here = [call for call in near if _meant(variant, call, seen)]
        groups = [here, *([[call] for call in here] if 1 < len(here) <= 4 else [])] if here else []
        if not here and variant.early:
            groups = [[call] for call in far if _meant(variant, call, seen)][:2]
        for group in groups:
            for parts, where in _predictions(seen, known, variant, group):
                says = f"it is what comes out with {variant.says}, where one device calls {group[0].which[0]}" + where
                yield Hypothesis(variant.name, says, variant.remedy, parts, seen.size, cost=1)


def _meant(variant: Variant, call: Noted, seen: Evidence) -> bool:
    """Whether a variant stands for this call; of `arange`, only where it may be the positions of rows."""
    of_rows = bool(
        call.which[0] != "arange" or seen.exact.dim() < 2 or (call.shape and call.shape[0] in seen.exact.shape[:-1])
    )
    return call.which[0] in variant.functions and of_rows


def _predictions(
    seen: Evidence, known: Context, variant: Variant, group: Sequence[Noted]
) -> Iterator[tuple[list[Tensor], str]]:
    """What every rank would have, and over which axes the variant sees ranks."""

    def under(rank: int, ranks: int) -> Tensor | None:
        def make(call: Call) -> Any:
            return variant.make(call, rank, ranks)

        applied = Applied({call.which: make for call in group})
        return known.under((seen.kind, seen.name), applied.change)

    if variant.kind == "alike" or variant.name.startswith("repeat"):
        full = under(0, 1)
        if full is not None:
            yield seen.parts(full), ""
    if variant.kind == "alike":
        return
    tried = set()
    for axes, ranks in seen.axes():
        if variant.kind == "parts":
            if ranks in tried:
                continue
            tried.add(ranks)
            full = under(0, ranks)
            if full is not None:
                yield seen.parts(full), f" (ranks of {list_of(axes)})"
            continue
        index = [_along(at, seen.mesh, axes) for at in seen.found.coordinates]
        fulls = {rank: under(rank, ranks) for rank in sorted(set(index))}
        made = [fulls[rank] for rank in index]
        if all(full is not None for full in made):
            places = zip(made, seen.found.coordinates)
            own = [seen.split.shard(full, seen.mesh, at) for full, at in places if full is not None]
            yield own, f" (ranks of {list_of(axes)})"


def _along(at: Mapping[str, int], mesh: Mapping[str, int], axes: Sequence[str]) -> int:
    rank = 0
    for axis in axes:
        rank = rank * mesh[axis] + at[axis]
    return rank


_TOLD: dict[Slot, tuple[str, str]] = {
    "eps": ("another epsilon", "give it the epsilon of one device"),
    "scale": ("scores scaled by another constant", "divide scores by √(features of one head)"),
    TIMES: ("scores scaled by another constant", "divide scores by √(features of one head)"),
}


def other_constants(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Another number in one of the functions that stand before the tensor; it is fitted, and printed."""
    near, _ = _window(seen, known)
    slots: dict[tuple[str, Slot, float], list[Noted]] = {}
    alike: dict[tuple[str, Slot, float], list[Noted]] = {}  # one number in several functions
    for call in reversed(near):
        for slot, value in call.numbers.items():
            slots.setdefault((call.which[0], slot, value), []).append(call)
            alike.setdefault(("several functions", slot, value), []).append(call)
    several = {key: calls for key, calls in alike.items() if len({call.which[0] for call in calls}) > 1}
    for (function, slot, value), calls in list((slots | several).items())[:_CONSTANTS]:
        found = _fitted(seen, known, calls, slot, value)
        if found is None and 1 < len(calls) <= 3:
            found = next((f for call in calls if (f := _fitted(seen, known, [call], slot, value))), None)
        if found is None:
            continue
        number, parts = found
        name, remedy = _TOLD.get(slot, ("another constant", "look for a scale, a power or an offset that differs"))
        square = (number / value) ** 2 if value else 0.0
        root = Fraction(square).limit_denominator(16)
        exactly = 0 < root < 65 and abs(float(root) / square - 1) < _NEAR
        shown = f" (√({root}) times as much)" if exactly and slot != "eps" else ""
        says = f"it is what comes out with {number:.4g} in {function}, where one device has {value:.4g}{shown}"
        yield Hypothesis(name, says, remedy, parts, seen.size, cost=2, fitted=1)


def _fitted(
    seen: Evidence, known: Context, calls: Sequence[Noted], slot: Slot, value: float
) -> tuple[float, list[Tensor]] | None:
    """The constant with which one device has nearly what the wrong ranks have: by secants, from its own."""
    wrong = [rank for rank in seen.ranks if bool(seen.wrong[rank].any())] or list(seen.ranks)
    if seen.exact.numel() < _LEAST or not all(bool(seen.held[rank].isfinite().all()) for rank in wrong):
        return None

    def computed(number: float) -> list[Tensor] | None:
        def instead(made: Call) -> Any:
            return made.with_number(slot, number)

        full = known.under((seen.kind, seen.name), calling({call.which: instead for call in calls}))
        return None if full is None or not bool(full.isfinite().all()) else seen.parts(full)

    def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return sum(float((a[rank] / seen.size[rank] * (b[rank] / seen.size[rank])).sum()) for rank in wrong)

    def less(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
        return [x - y for x, y in zip(a, b)]

    old, at = seen.right, value
    number = value + (max(abs(value), 1e-6) if slot == "eps" else max(abs(value), 1e-3) / 64)
    for attempt in range(8):
        made = computed(number)
        if made is None:
            return None
        slope, left = less(made, old), less(seen.held, made)
        along, across, far = inner(slope, left), inner(slope, slope), inner(left, left)
        if attempt and far <= sum(one.numel() for one in made):  # as near as rounding
            rounder = float(f"{number:.1e}")
            other = computed(rounder) if 0 < abs(number - rounder) < _ROUNDER * abs(number) else None
            fits = other is not None and inner(off := less(seen.held, other), off) <= 4 * max(far, 1.0)
            return (rounder, other) if other is not None and fits else (number, made)
        if across == 0 or (not attempt and along * along < _ALIKE**2 * across * far):
            return None
        old, at, number = made, number, number + along / across * (number - at)
        if slot == "eps":
            number = max(number, 0.0)
        if number == at:
            return (number, made) if attempt else None
    return at, old


_ROOTS = ("sqrt", "rsqrt")


def epsilon_moved(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """An epsilon that is written out stands inside the root in place of outside, or the reverse."""
    near, _ = _window(seen, known)
    for first, then in pairwise(near):
        added, root = (first, then) if first.which[0] == "add" else (then, first)
        eps = next(iter(added.numbers.values()), 0.0)
        if added.which[0] != "add" or root.which[0] not in _ROOTS or not 0 < eps < _SMALL:
            continue
        if added is first:
            outside: dict[Which, Instead] = {added.which: _tensor, root.which: partial(_outside, eps)}
            full, where = known.under((seen.kind, seen.name), calling(outside)), "outside"
        else:
            inside = partial(_inside, eps)
            full, where = known.under((seen.kind, seen.name), calling({added.which: inside})), "inside"
        if full is not None:
            says = f"it is what comes out with epsilon, {eps:.3g}, {where} the root"
            remedy = "let epsilon stand where it does on one device"
            yield Hypothesis(f"epsilon {where} the root", says, remedy, seen.parts(full), seen.size, cost=1)


_SMALL = 0.1


def _tensor(call: Call) -> Any:
    return next(value for value in call.args if isinstance(value, Tensor))


def _outside(eps: float, call: Call) -> Tensor:
    root = call.args[0].sqrt() + eps
    return root.reciprocal() if call.name == "rsqrt" else root


def _inside(eps: float, call: Call) -> Tensor:
    return (_tensor(call).square() + eps).sqrt()


_TABLES = ("cos", "sin", "rope", "rotary", "freqs_cis", "pos")


def other_tables(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """Tables of positions (buffers for rotary embeddings, parameters) read at other rows."""
    near, _ = _window(seen, known)
    if not near or seen.exact.dim() < 2:
        return
    remedy = "a rank that has part of the sequence reads the table from the position of its first row"
    lengths = [size for size in dict.fromkeys(seen.exact.shape[:-1]) if size > 1]
    by_rank: list[tuple[str, str, int, int]] = [("at position 0 everywhere", "positions left out", 0, 1)]
    for axes, p in seen.axes():
        over = list_of(axes)
        for n in lengths:
            if n % p == 0 and n > p:
                said = (f"at row 0 of the table on each rank of {over}", "positions of the rank's own rows")
                by_rank.append((*said, n, n // p))
    key = (seen.kind, seen.name)
    for buffers in (True, False):
        for says, name, length, step in by_rank:
            full = known.under(key, Change(partial(_read, True, buffers, length, step)))
            if full is not None:
                yield Hypothesis(name, f"it is what comes out {says}", remedy, seen.parts(full), seen.size, cost=1)
        steps = dict.fromkeys(step for *_, step in by_rank[1:])
        for by in dict.fromkeys((1, -1, *steps)):
            full = known.under(key, Change(partial(_read, False, buffers, 0, by)))
            if full is not None:
                says = f"it is what comes out if tables of positions are read {by} rows later"
                yield Hypothesis("positions shifted", says, remedy, seen.parts(full), seen.size, cost=1)
        for axes, p in seen.axes():
            index = [_along(at, seen.mesh, axes) for at in seen.found.coordinates]
            for by in dict.fromkeys((*steps, 1)):
                made = [known.under(key, Change(partial(_read, False, buffers, 0, by * rank))) for rank in range(p)]
                own = [
                    seen.split.shard(full, seen.mesh, at)
                    for full, at in zip((made[rank] for rank in index), seen.found.coordinates)
                    if full is not None
                ]
                if len(own) == len(index):
                    over = list_of(axes)
                    says = f"it is what comes out if rank r of {over} reads tables of positions {by}·r rows later"
                    yield Hypothesis("positions shifted", says, remedy, own, seen.size, cost=1)


@contextmanager
def _read(again: bool, buffers: bool, length: int, step: int, model: nn.Module) -> Iterator[None]:
    """Tables, which are buffers or parameters, with their rows at other places: all later by a step, or, of the first
    `length`, those of the first step again and again (of all, where it is 0 and the step 1). The model is a copy."""
    found = False
    for name, table in model.named_buffers() if buffers else model.named_parameters():
        rows = [d for d in range(table.dim()) if table.shape[d] > 1]
        owner = model.get_submodule(name.rpartition(".")[0])
        layer = not buffers and not any(True for _ in owner.children())  # its weight is no table, unless it says so
        if not (table.is_floating_point() or table.is_complex()) or len(rows) < 2:
            continue
        if layer and not any(mark in name.lower() for mark in _TABLES):
            continue
        dim = rows[-2]
        index = torch.arange(table.shape[dim], device=table.device)
        if again:
            index[: length or len(index)] %= step
        table.data = table.data.index_select(dim, index) if again else table.data.roll(-step, dim)
        found = True
    if not found:
        raise NotThis
    yield
