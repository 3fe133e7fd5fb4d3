"""How features are stored: a layout without its rows, `d -> h/tp,k`, as plans write it.

d -> h/tp,k                        column parallel, in whole heads
h/tp,k -> d                        row parallel
d -> c,f/tp                        c parts in one weight, each sharded (gate and up)
d -> h/tp,k + g/tp,k + g/tp,k      a concatenation of parts of other sizes (query, key and value)
d -> v/tp -> v                     column parallel, and the product gathered
h/tp,k                             the features of a norm, or an integer that counts them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from shardgrad.errors import LayoutError
from shardgrad.layout.notation import Dim, parse_tensor

Letters = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Features:
    """What a plan says of one module.

    text: as it was written.
    into: the letters of the input's features; none where the text has no arrow.
    parts: those of the output's, of several where it is a concatenation.
    gathered: whether the output is gathered again.
    """

    text: str
    into: Letters
    parts: tuple[Letters, ...]
    gathered: bool = False

    @classmethod
    def of(cls, text: str, where: str) -> Features:
        """Read a text. where: the pattern that it stands beside, for errors.

        Raises:
            LayoutError: it is no such text.
        """
        if not isinstance(text, str):
            raise LayoutError(f"{where}: a plan holds texts such as 'd -> h/tp,k', not {type(text).__name__}")
        sides = [side.strip() for side in text.replace("→", "->").split("->")]
        if len(sides) > 3 or not all(sides):
            raise LayoutError(
                f"{where}: {text!r} is not of the form 'in -> out', 'in -> out/axis -> out' or 'features'"
            )
        if len(sides) == 1:
            return cls(text, (), (_letters(sides[0], text, where),))
        parts = tuple(_letters(part, text, where) for part in sides[1].split("+"))
        into = _letters(sides[0], text, where)
        for part in parts:
            both = {dim.letter for dim in into} & {dim.letter for dim in part}
            if both:
                raise LayoutError(f"{where}: {text!r} has {', '.join(sorted(both))} on both sides of the arrow")
        if len(sides) == 3:
            last = _letters(sides[2], text, where)
            if any(dim.axes for dim in last) or [(d.letter,) for d in last] != [(d.letter,) for d in parts[0]]:
                raise LayoutError(f"{where}: {text!r} gathers its output: its end is the same letters without axes")
        return cls(text, into, parts, len(sides) == 3)

    @property
    def letters(self) -> tuple[Dim, ...]:
        """All of them, once each."""
        return tuple({dim.letter: dim for side in (self.into, *self.parts) for dim in side}.values())

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(axis for side in (self.into, *self.parts) for dim in side for axis in dim.axes))

    def kind(self, axis: str) -> str:
        """`row`, `column` or `replicated`: what the axis shards.

        Raises:
            LayoutError: it shards both sides.
        """
        row = any(axis in dim.axes for dim in self.into)
        column = any(axis in dim.axes for part in self.parts for dim in part)
        if row and column:
            raise LayoutError(
                f"{self.text!r} has {axis} on both sides: an axis shards the input's features or the output's"
            )
        return "row" if row else "column" if column else "replicated"

    def __str__(self) -> str:
        return self.text


def _letters(text: str, whole: str, where: str) -> Letters:
    try:
        spec = parse_tensor(f"F[{text}]")
    except LayoutError as error:
        why = str(error).splitlines()[-2]
        raise LayoutError(
            f"{where}: cannot read {text.strip()!r} of {whole!r}: {why}\n"
            "a plan's text reads like  d -> f/tp  or, of a fused weight,  d -> c,h/tp,k"
        ) from None
    if spec.grad_partial or spec.partial:
        raise LayoutError(f"{where}: {whole!r} marks a sum: a plan says how features are stored, sums follow")
    return spec.dims


def division(letters: Letters, sizes: Mapping[str, int], axis: str) -> list[tuple[int, bool]]:
    """How an axis divides some features, whatever their letters: factors of their number, major first, and which
    of them is sharded."""
    made: list[tuple[int, bool]] = []
    for dim in letters:
        sharded = axis in dim.axes
        if made and not sharded and not made[-1][1]:
            made[-1] = made[-1][0] * sizes[dim.letter], False
        elif sizes[dim.letter] > 1 or sharded:
            made.append((sizes[dim.letter], sharded))
    return made


def written(letters: Iterable[Dim]) -> str:
    return ",".join(map(str, letters))


def complete(letters: Letters, size: int, sizes: Mapping[str, int], where: str) -> dict[str, int]:
    """The sizes of letters that make `size` together, with the one that is not given.

    Raises:
        LayoutError: they do not make it, or several are not given.
    """
    known = {dim.letter: sizes[dim.letter] for dim in letters if dim.letter in sizes}
    missing = [dim.letter for dim in letters if dim.letter not in sizes]
    made = prod(known.values())
    if len(missing) == 1 and made and size % made == 0:
        return {**known, missing[0]: size // made}
    if missing or made != size:
        said = ", ".join(f"{dim.letter}={known.get(dim.letter, '?')}" for dim in letters)
        hint = f": give sizes={{{missing[0]!r}: …}}" if len(missing) > 1 else ""
        raise LayoutError(f"{where} has {size} features, which {written(letters)} with {said} does not make{hint}")
    return known
