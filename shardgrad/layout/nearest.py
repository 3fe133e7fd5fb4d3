"""The nearest legal layouts to an illegal one: for each misplaced axis, the fewest axes added, moved or removed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product as every
from typing import Any

from shardgrad.layout.notation import Notation, TensorSpec, point
from shardgrad.layout.rule import Illegal, read

MOST = 3
_THREE = ("lhs", "rhs", "out")
_ROUNDS = 4  # axes mended one after the other; a layout with more wrong than this gets no proposal


def nearest(layout: Notation, wrong: Illegal) -> list[str]:
    """Up to three legal layouts, nearest first; none where the letters themselves are at fault."""
    found: dict[str, int] = {}
    bare = unmarked(layout)

    def keep(cost: int, legal: Notation) -> None:
        marked = _marked(legal, layout)
        text = str(marked)
        cost += _marks(layout) - _marks(marked)
        found[text] = min(cost, found.get(text, cost))

    try:
        read(bare)
    except Illegal:
        frontier = [(0, bare, wrong.axis, wrong.letter)]
    else:  # only a mark is wrong
        keep(0, bare)
        return list(found)
    for _ in range(_ROUNDS):
        later = []
        for cost, candidate, axis, letter in frontier:
            for extra, changed in _mended(candidate, axis, letter):
                try:
                    read(changed)
                except Illegal as still:
                    later.append((cost + extra, changed, still.axis, still.letter))
                else:
                    keep(cost + extra, changed)
        if found or not later:
            break
        frontier = sorted(later, key=lambda entry: entry[0])[:32]
    return sorted(found, key=lambda text: (found[text], len(text), text))[:MOST]


def _marks(layout: Notation) -> int:
    return sum(len(tensor.partial) + len(tensor.grad_partial) for tensor in layout.tensors)


def _marked(legal: Notation, layout: Notation) -> Notation:
    """The legal layout with those marks of the written one that it can carry."""
    for role in (*_THREE, "bias"):
        written, now = getattr(layout, role), getattr(legal, role)
        if written is None or now is None:
            continue
        for axis in dict.fromkeys((*written.partial, *written.grad_partial)):
            side = "partial" if role == "out" else "grad_partial"
            marked = legal._replace(**{role: replace(getattr(legal, role), **{side: (*getattr(now, side), axis)})})
            try:
                read(marked)
            except Illegal:
                continue
            legal, now = marked, getattr(marked, role)
    return legal


def _mended(layout: Notation, axis: str | None, letter: str | None) -> Iterator[tuple[int, Notation]]:
    if layout.bias and (axis in layout.bias.axes or letter in layout.bias.letters) and _bias_alone_is_wrong(layout):
        yield 1, layout._replace(bias=None)
    if axis is not None:
        yield from _placed_anew(layout, axis)
    if letter is not None:
        yield from _ordered_anew(layout, letter)


def _bias_alone_is_wrong(layout: Notation) -> bool:
    try:
        read(layout._replace(bias=None))
    except Illegal:
        return False
    return True


def _placed_anew(layout: Notation, axis: str) -> Iterator[tuple[int, Notation]]:
    """The axis made to split each letter in turn, stored or not by the tensor that lacks the letter."""
    three = (layout.lhs, layout.rhs, layout.out)
    for split in dict.fromkeys(letter for tensor in three for letter in tensor.letters):
        choices: list[list[tuple[int, TensorSpec]]] = []
        for tensor in three:
            places = [split] if split in tensor.letters else [None, *tensor.letters]
            choices.append([_moved(tensor, axis, place) for place in places])
        for picked in every(*choices):
            cost = sum(extra for extra, _ in picked)
            yield cost, _with(layout, dict(zip(_THREE, (t for _, t in picked))))
    without = [_moved(tensor, axis, None) for tensor in three]
    yield (
        sum(extra for extra, _ in without),
        _with(layout, dict(zip(_THREE, (t for _, t in without)))),
    )


def _with(layout: Notation, changed: dict[str, Any]) -> Notation:
    return layout._replace(**changed)


def _moved(tensor: TensorSpec, axis: str, letter: str | None) -> tuple[int, TensorSpec]:
    """The tensor with the axis on one letter (or none), kept where it already is, else put innermost."""
    before = [dim.letter for dim in tensor.dims for a in dim.axes if a == axis]
    if before == ([letter] if letter else []):
        return 0, tensor
    axes = {dim.letter: tuple(a for a in dim.axes if a != axis) for dim in tensor.dims}
    if letter:
        axes[letter] += (axis,)
    kept = letter in before
    return len(before) - kept + (letter is not None and not kept), tensor.with_axes(axes)


def _ordered_anew(layout: Notation, letter: str) -> Iterator[tuple[int, Notation]]:
    """The axes of one letter in the order in which some tensor lists them, and with the common ones first."""
    three = (layout.lhs, layout.rhs, layout.out)
    carriers = [tensor for tensor in three if letter in tensor.letters]
    shared = (
        [a for a in carriers[0].axes_of(letter) if all(a in t.axes_of(letter) for t in carriers)] if carriers else []
    )
    for model in carriers:
        order = sorted(shared, key=model.axes_of(letter).index)
        changed, cost = {}, 0
        for role, tensor in zip(_THREE, three):
            axes = tensor.axes_of(letter)
            new = (*order, *(a for a in axes if a not in order)) if axes else axes
            cost += axes != new
            changed[role] = tensor.with_axes({letter: new})
        if cost:
            yield cost, _with(layout, changed)


def refusal(text: str, notation: Notation, wrong: Illegal) -> str:
    """The message for an illegal layout: where, why, and what is legal instead."""
    at, width = locate(text, wrong.tensor, wrong.letter, wrong.axis)
    lines = ["illegal layout", point(text, at, width), wrong.why]
    proposals = nearest(notation, wrong)
    if proposals:
        lines += ["the nearest legal layouts:", *(f"  {proposal}" for proposal in proposals)]
    return "\n".join(lines)


def locate(text: str, tensor: str, letter: str | None, axis: str | None) -> tuple[int, int]:
    """Where a tensor, a letter of it, or an axis on that letter stands in the text: (column, width)."""
    start = re.search(rf"\b{re.escape(tensor)}\s*\[", text)
    if start is None:
        return 0, len(text)
    inside = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
    close = text.find("]", start.end())
    for dim in re.finditer(r"[^,\[\]]+", text[start.end() : close]) if letter or axis else ():
        words = list(inside.finditer(dim.group()))
        if letter is not None and (not words or words[0].group() != letter):
            continue
        for word in reversed(words) if axis else words[:1]:
            if axis in (None, word.group()):
                return start.end() + dim.start() + word.start(), len(word.group())
    return start.start(), len(tensor)


def unmarked(layout: Notation) -> Notation:
    """The layout without its marks: what the nearest legal layouts are looked for among."""

    def bare(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, partial=(), grad_partial=())

    bias = bare(layout.bias) if layout.bias else None
    return layout._replace(lhs=bare(layout.lhs), rhs=bare(layout.rhs), out=bare(layout.out), bias=bias)
