"""Layouts of layers, with symbols for what each model decides: `X[n/sp,d] W[m/tp,d] -> Y[n,m/tp] + B[m/tp]`.

| symbol   | becomes                                                                                              |
| -------- | ---------------------------------------------------------------------------------------------------- |
| `n`      | the rows, as many letters as the input has dims besides those written: none, `n`, `b,s`, …            |
| `/tp`    | the layer's axis                                                                                     |
| `/sp`    | the layer's axis on the letter of `sequence_dim`; nothing without it                                 |
| (`/dp`)  | not written: the data parallel axis shards the first row, and weights are stored over it             |
| (`{tp}`) | not written: with reduce=False, the mark of each tensor written with `/sp`, the ones that leave      |
| `+ B[…]` | the bias, left out where there is none                                                               |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardgrad.errors import ShapeError
from shardgrad.layout.notation import Notation, TensorSpec
from shardgrad.nn.parallel import Parallel

if TYPE_CHECKING:
    from shardgrad.layout.batch_axis import BatchAxis

ROWS, AXIS, SEQUENCE = "n", "tp", "sp"
_LETTERS = {0: (), 1: ("n",), 2: ("b", "s"), 3: ("a", "b", "s")}


def row_letters(count: int) -> tuple[str, ...]:
    """Letters for the leading dims of an input: `b, s` for two of them."""
    return _LETTERS.get(count) or tuple(f"n{at}" for at in range(count))


def sequence_row(rows: int, sequence_dim: int, user: str) -> int:
    """Which of so many rows the sequence dim is, of a tensor that has one dim of features after them.

    Raises:
        ShapeError: the tensor has no such dim, or it is the last one, which holds the features.
    """
    dims = rows + 1
    if not -dims <= sequence_dim < dims or sequence_dim % dims == rows:
        raise ShapeError(
            f"{user}: sequence_dim={sequence_dim} of {dims} dims is not a row dim (the last one holds features)"
        )
    return sequence_dim % dims


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a call: their letters, those that `n` stands for, the one that `sequence_dim` shards, and the data
    parallel axis, which shards the first of them."""

    letters: tuple[str, ...]
    many: tuple[str, ...]
    sequence: str | None
    data: BatchAxis | None

    @classmethod
    def of(cls, template: Notation, count: int, parallel: Parallel, user: str) -> Rows:
        """count: how many rows `n` stands for.

        Raises:
            ShapeError: sequence_dim is none of them, or there is none that the data parallel axis could shard.
        """
        lhs, many = template.lhs.letters, row_letters(count)
        rows = [x for x in lhs if x in template.out.letters and x not in template.rhs.letters]
        letters = tuple(one for x in rows for one in (many if x == ROWS else (x,)))
        if parallel.data is not None and not letters:
            raise ShapeError(f"{user}: an input of one dim has no batch that {parallel.data.axis} could shard")
        sequence = None
        if parallel.sequence_dim is not None:
            written = next((d.letter for t in template.tensors for d in t.dims if SEQUENCE in d.axes), None)
            sequence = many[sequence_row(count, parallel.sequence_dim, user)] if written == ROWS else written
        return cls(letters, many, sequence, parallel.data)

    def stored(self, spec: TensorSpec, axis: str, reduce: bool = True) -> str:
        """An input or an output with its symbols replaced."""
        dims = []
        for dim in spec.dims:
            for letter in self.many if dim.letter == ROWS else (dim.letter,):
                axes = [axis for symbol in dim.axes if symbol != SEQUENCE or letter == self.sequence]
                first = [self.data.axis] if self.data is not None and letter == self.letters[0] else []
                dims.append("/".join((letter, *first, *axes)))
        leaves = any(SEQUENCE in dim.axes for dim in spec.dims)
        return f"{spec.name}[{','.join(dims)}]" + (f"{{{axis}}}" if leaves and not reduce else "")


def on_axis(spec: TensorSpec, axis: str) -> TensorSpec:
    """A weight or a bias with the symbol of the axis replaced."""
    return spec.with_axes({dim.letter: tuple(axis for _ in dim.axes) for dim in spec.dims})
