"""The notation: text to tensors of letters and axes, and back. What is *legal* is decided in `rule`.

    X[n/dp,d] W[d,m/tp]{dp} -> Y[n/dp,m/tp] + B[m/tp]

A tensor is a name, its dims in order, and in braces the axes over which a sum is left to the caller. A dim is a
letter and the mesh axes that it is sharded over, major first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from shardgrad.errors import LayoutError, shorten

MOST_TEXT = 500  # characters of a layout, which messages repeat

_TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z_][A-Za-z0-9_]*)|(?P<arrow>->|→)|(?P<mark>[\[\]{},/+])|(?P<end>$))")


@dataclass(frozen=True, slots=True, repr=False)
class Dim:
    """One dimension: its letter, and the axes that it is sharded over, major first (`d/tp`)."""

    letter: str
    axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join((self.letter, *self.axes))

    __repr__ = __str__


@dataclass(frozen=True, slots=True, repr=False)
class TensorSpec:
    """How one tensor is stored: dims in order, and what is left unsummed.

    partial: axes over which the local *value* is one term of a sum (the mark on a product, `Y[n,m]{tp}`).
    grad_partial: axes over which its *gradient* is one term of a sum (the mark on an operand, `X[n,d]{tp}`).
    """

    name: str
    dims: tuple[Dim, ...]
    partial: tuple[str, ...] = ()
    grad_partial: tuple[str, ...] = ()

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(dim.letter for dim in self.dims)

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis that the tensor is sharded over, dim by dim."""
        return tuple(axis for dim in self.dims for axis in dim.axes)

    @property
    def grad(self) -> TensorSpec:
        """How the gradient is stored: like the tensor, and partial where the tensor is marked."""
        return TensorSpec(f"d{self.name}", self.dims, partial=self.grad_partial, grad_partial=self.partial)

    def letter_with(self, axis: str) -> str | None:
        """The letter that has the axis in this tensor, or None."""
        return next((dim.letter for dim in self.dims if axis in dim.axes), None)

    def axes_of(self, letter: str) -> tuple[str, ...]:
        """The axes on a letter; none if the tensor lacks it."""
        return next((dim.axes for dim in self.dims if dim.letter == letter), ())

    def with_axes(self, axes: dict[str, tuple[str, ...]]) -> TensorSpec:
        """The same tensor with the axes of some letters replaced."""
        return replace(self, dims=tuple(Dim(d.letter, axes.get(d.letter, d.axes)) for d in self.dims))

    def __str__(self) -> str:
        marks = self.partial or self.grad_partial
        return f"{self.name}[{','.join(map(str, self.dims))}]" + (f"{{{','.join(marks)}}}" if marks else "")

    __repr__ = __str__


class Notation(NamedTuple):
    """A layout as it was written: nothing has been judged yet but its grammar.

    spatial: how many dims of each tensor, the last ones, are those that a convolution slides along.
    """

    lhs: TensorSpec
    rhs: TensorSpec
    out: TensorSpec
    bias: TensorSpec | None
    spatial: int = 0

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(t for t in (self.lhs, self.rhs, self.out, self.bias) if t is not None)

    @property
    def spatial_letters(self) -> tuple[str, ...]:
        three = (self.lhs, self.rhs, self.out)
        return tuple(letter for t in three for letter in t.letters[len(t.dims) - self.spatial :])

    def __str__(self) -> str:
        bias = f" + {self.bias}" if self.bias else ""
        return f"{self.lhs} {self.rhs} -> {self.out}{bias}"


def point(text: str, at: int, width: int = 1) -> str:
    """The layout with a caret line under what is meant."""
    return f"  {text}\n  {' ' * at}{'^' * max(width, 1)}"


def parse(text: str) -> Notation:
    """Read a layout's grammar.

    Raises:
        LayoutError: with the text, a caret under the place, and what was expected there.
    """
    if not isinstance(text, str):
        raise LayoutError(f"a layout is a string such as 'X[n,d] W[d,m/tp] -> Y[n,m/tp]', not {type(text).__name__}")
    if len(text) > MOST_TEXT:
        raise LayoutError(f"a layout of {len(text):,} characters, more than {MOST_TEXT}: {shorten(text)}")
    return _Reader(text, _EXAMPLE).layout()


def parse_tensor(text: str) -> TensorSpec:
    """Read one tensor, such as `W[m/tp,d]`.

    Raises:
        LayoutError: as `parse`.
    """
    if not isinstance(text, str) or len(text) > MOST_TEXT:
        raise LayoutError(
            f"a tensor is a string such as 'W[m/tp,d]' of at most {MOST_TEXT} characters: {shorten(text)}"
        )
    reader = _Reader(text, "a tensor reads like  W[d,m/tp]")
    name, dims, marks = reader.tensor("a tensor")
    reader.end()
    return TensorSpec(name, dims, grad_partial=marks)


_EXAMPLE = "a layout reads like  X[n,d] W[d,m/tp] -> Y[n,m/tp]  or, with a bias,  … + B[m/tp]"


class _Reader:
    def __init__(self, text: str, example: str) -> None:
        self.text, self.example = text, example
        self.tokens = list(self._tokens())
        self.next = 0

    def _tokens(self) -> Iterator[tuple[str, str, int]]:
        at = 0
        while True:
            match = _TOKEN.match(self.text, at)
            if match is None:
                at += len(self.text[at:]) - len(self.text[at:].lstrip())
                raise self._failed(at, f"{self.text[at]!r} has no meaning in a layout")
            kind = match.lastgroup or "end"
            yield kind, match.group(kind), match.start(kind)
            if kind == "end":
                return
            at = match.end()

    def _failed(self, at: int, why: str) -> LayoutError:
        a_name = re.fullmatch(r"[\w.]+", self.text.strip())
        named = "\nlayouts with a name are in PRESETS: sg.PRESETS['column']" if a_name else ""
        return LayoutError(f"cannot read the layout\n{point(self.text, at)}\n{why}\n{self.example}{named}")

    def _peek(self) -> tuple[str, str]:
        return self.tokens[self.next][:2]

    def _take(self, what: str, kind: str, value: str | None = None) -> str:
        found_kind, found, at = self.tokens[self.next]
        if found_kind != kind or (value is not None and found != value):
            raise self._failed(at, f"expected {what}, {f'found {found!r}' if found else 'but the text ends'}")
        self.next += 1
        return found

    def _axes(self, opening: str) -> tuple[str, ...]:
        axes = []
        while self._peek() == ("mark", opening):
            self.next += 1
            axes.append(self._take("the name of a mesh axis", "word"))
        return tuple(axes)

    def tensor(self, what: str) -> tuple[str, tuple[Dim, ...], tuple[str, ...]]:
        name = self._take(what, "word")
        self._take(f"'[' and the letters of {name}", "mark", "[")
        dims = []
        while self._peek() != ("mark", "]"):
            letter = self._take(f"a letter of {name}", "word")
            dims.append(Dim(letter, self._axes("/")))
            if self._peek() != ("mark", "]"):
                self._take(f"',' or ']' in {name}", "mark", ",")
        self.next += 1
        marks: list[str] = []
        if self._peek() == ("mark", "{"):
            self.next += 1
            marks.append(self._take("the name of a mesh axis", "word"))
            marks.extend(self._axes(","))
            self._take("'}'", "mark", "}")
        return name, tuple(dims), tuple(marks)

    def end(self) -> None:
        self._take("the end of the layout", "end")

    def layout(self) -> Notation:
        def operand(what: str) -> TensorSpec:
            name, dims, marks = self.tensor(what)
            return TensorSpec(name, dims, grad_partial=marks)

        first, second = operand("the first operand"), operand("the second operand")
        self._take("'->' and the product", "arrow")
        name, dims, marks = self.tensor("the product")
        product = TensorSpec(name, dims, partial=marks)
        bias = None
        if self._peek() == ("mark", "+"):
            self.next += 1
            bias = operand("the bias")
        self.end()
        return Notation(first, second, product, bias)
