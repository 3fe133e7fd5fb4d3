"""Layouts of layers, with symbols for what each model decides: `X[n/sp,d] W[m/tp,d] -> Y[n,m/tp] + B[m/tp]`.

| symbol   | becomes                                                                                              |
| -------- | ---------------------------------------------------------------------------------------------------- |
| `n`      | the rows, as many letters as the input has dims beside those written: none, `n`, `b,s`, …            |
| `/tp`    | the layer's axis                                                                                     |
| `/sp`    | the layer's axis on the letter of `sequence_dim`; nothing without it                                 |
| (`/dp`)  | not written: the data parallel axis shards the first row, and weights are stored over it             |
| (`{tp}`) | not written: with reduce=False, the mark of each tensor written with `/sp`, the ones that leave      |
| `+ B[…]` | the bias, left out where there is none                                                               |
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property

from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.batch_axis import BatchAxis
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import Notation, TensorSpec, parse
from shardgrad.nn.parallel import Parallel
from shardgrad.ops.bilinear import CONTRACT, Operation
from shardgrad.ops.bound import BoundMatmul, Given
from shardgrad.ops.matmul import bind

ROWS, AXIS, SEQUENCE = "n", "tp", "sp"
_LETTERS = {0: (), 1: ("n",), 2: ("b", "s"), 3: ("a", "b", "s")}


def row_letters(count: int) -> tuple[str, ...]:
    """Letters for the leading dims of an input: `b, s` for two of them."""
    return _LETTERS.get(count) or tuple(f"n{at}" for at in range(count))


def sequence_row(rows: int, sequence_dim: int, who: str) -> int:
    """Which of so many rows the sequence dim is, of a tensor that has one dim of features after them.

    Raises:
        ShapeError: the tensor has no such dim, or it is the last one, which holds the features.
    """
    dims = rows + 1
    if not -dims <= sequence_dim < dims or sequence_dim % dims == rows:
        raise ShapeError(
            f"{who}: sequence_dim={sequence_dim} of {dims} dims is not a row dim (the last one holds features)"
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
    def of(cls, template: Notation, count: int, parallel: Parallel, who: str) -> Rows:
        """count: how many rows `n` stands for.

        Raises:
            ShapeError: sequence_dim is none of them, or there is none that the data parallel axis could shard.
        """
        lhs, many = template.lhs.letters, row_letters(count)
        rows = [x for x in lhs if x in template.out.letters and x not in template.rhs.letters]
        letters = tuple(one for x in rows for one in (many if x == ROWS else (x,)))
        if parallel.data is not None and not letters:
            raise ShapeError(f"{who}: an input of one dim has no batch that {parallel.data.axis} could cut")
        sequence = None
        if parallel.sequence_dim is not None:
            written = next((d.letter for t in template.tensors for d in t.dims if SEQUENCE in d.axes), None)
            sequence = many[sequence_row(count, parallel.sequence_dim, who)] if written == ROWS else written
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


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a layer: its template, or its layout where nothing is left to decide, and as what its weight and
    bias are stored."""

    template: str | Layout
    weight: TensorSpec
    bias: TensorSpec | None

    def layout(self, notation: Notation, rows: Rows, axis: str, reduce: bool, biased: bool) -> Layout:
        if isinstance(self.template, Layout):
            return self.template
        x, y = rows.stored(notation.lhs, axis, reduce), rows.stored(notation.out, axis, reduce)
        return Layout(f"{x} {self.weight} -> {y}" + (f" + {self.bias}" if biased else ""))


@dataclass(frozen=True, slots=True)
class Bound:
    """A layer's products of one input, for an input of so many dims, with what each call has to add.

    given: the sizes that the layer knows. rows: the row letters. sequence: the one whose size a call may tell.
    """

    product: BoundMatmul
    given: Given
    rows: tuple[str, ...]
    sequence: str | None


@dataclass(frozen=True)
class Recipe:
    """Products of one input, and all that binding them on a mesh depends on. Nothing of it can be forgotten in `key`,
    by which torch.compile tells graphs apart: they are made of the same fields."""

    who: str
    products: tuple[Product, ...]
    sizes: Given
    parallel: Parallel
    reduce: bool
    save_gathered: tuple[str, ...]
    operation: Operation | None
    key: str = field(init=False)  # the recipe as text: equal for recipes that bind alike on one mesh

    def __post_init__(self) -> None:
        made = (getattr(self, one.name) for one in fields(self) if one.init)
        object.__setattr__(self, "key", "; ".join(map(str, made)))

    def __deepcopy__(self, memo: object) -> Recipe:
        return self

    @cached_property
    def notations(self) -> tuple[Notation, ...]:
        """The templates, read."""
        return tuple(parse(str(one.template)) for one in self.products)

    @cached_property
    def features(self) -> int:
        """How many dims the input has beside those that `n` stands for."""
        return sum(dim.letter != ROWS for dim in self.notations[0].lhs.dims)

    def rows(self, dims: int) -> Rows:
        """The rows of an input of so many dims.

        Raises:
            ShapeError: as `Rows.of`, or the input has fewer dims than features.
        """
        if isinstance(self.products[0].template, Layout):
            return Rows(self.products[0].template.rows, (), None, None)
        if dims < self.features:
            got = "a scalar" if dims == 0 else f"{dims} dims"
            least = "one dim" if self.features == 1 else f"{self.features} dims"
            raise ShapeError(f"{self.who} needs an input of at least {least}, got {got}")
        return Rows.of(self.notations[0], dims - self.features, self.parallel, self.who)

    def layouts(self, dims: int, biased: bool) -> tuple[Layout, ...]:
        """The layouts for an input of so many dims."""
        rows = self.rows(dims)
        pairs = zip(self.products, self.notations)
        return tuple(one.layout(text, rows, self.parallel.axis, self.reduce, biased) for one, text in pairs)

    def bind(self, dims: int, biased: bool) -> Bound:
        """The products for an input of so many dims.

        Raises:
            ShapeError: as `rows`.
        """
        rows, layouts = self.rows(dims), self.layouts(dims, biased)
        operation = CONTRACT if self.operation is None else self.operation
        given = tuple((x, size) for x, size in self.sizes if any(x in layout.letters for layout in layouts))
        parallel = self.parallel
        product = bind(
            layouts, (biased,) * len(layouts), parallel.mesh, self.save_gathered, parallel.reduce_dtype, operation
        )
        return Bound(product, given, rows.letters, rows.sequence)


def check_sequence_dim(sequence_dim: object, who: str) -> None:
    """Refuse what is the row dim of no input.

    Raises:
        ShapeError: sequence_dim is neither None nor an integer, or -1.
    """
    if sequence_dim is None:
        return
    if not isinstance(sequence_dim, int) or isinstance(sequence_dim, bool):
        raise ShapeError(f"{who}: sequence_dim is the number of a dim, or None; not {sequence_dim!r}")
    if sequence_dim == -1:
        raise ShapeError(f"{who}: sequence_dim=-1 is not a row dim (the last one holds features)")


def check_reduce(reduce: bool, sequence_dim: int | None, who: str) -> None:
    """Refuse a layer that would leave its sums to the caller and yet take or leave shards of the sequence.

    Raises:
        LayoutError: both are asked for.
    """
    if not reduce and sequence_dim is not None:
        raise LayoutError(
            f"{who}: with reduce=False the caller gathers x and reduces y (sg.all_gather, sg.reduce_scatter along the "
            f"sequence), and the layer sees whole sequences: leave out sequence_dim={sequence_dim}"
        )
