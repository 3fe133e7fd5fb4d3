"""From a layer's templates to bound products: everything that binding depends on, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property

from shardgrad.errors import ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import Notation, TensorSpec, parse
from shardgrad.nn.parallel import Parallel
from shardgrad.nn.template import ROWS, Rows
from shardgrad.ops.bilinear import CONTRACT, Operation
from shardgrad.ops.bound import BoundMatmul, Given, bind


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a layer: its template, or its layout where nothing is left to decide, and how its weight and bias
    are stored, with the names of these parameters."""

    template: str | Layout
    weight: TensorSpec
    bias: TensorSpec | None
    names: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Bound:
    """A layer's products of one input, for an input of so many dims, with what each call has to add.

    given: the sizes that the layer knows. sequence: the letter whose size a call may give.
    """

    matmul: BoundMatmul
    given: Given
    sequence: str | None


@dataclass(frozen=True)
class Recipe:
    """Products of one input, and all that binding them on a mesh depends on. Nothing of it can be forgotten in `key`,
    by which torch.compile distinguishes graphs: they are made of the same fields."""

    user: str
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
        """How many dims the input has besides those that `n` stands for."""
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
            raise ShapeError(f"{self.user} needs an input of at least {least}, got {got}")
        return Rows.of(self.notations[0], dims - self.features, self.parallel, self.user)

    def layouts(self, dims: int, biased: bool) -> tuple[Layout, ...]:
        """The layouts for an input of so many dims."""
        rows, axis, found = self.rows(dims), self.parallel.axis, []
        for one, notation in zip(self.products, self.notations):
            if isinstance(one.template, Layout):
                found.append(one.template)
                continue
            x, y = (rows.stored(spec, axis, self.reduce) for spec in (notation.lhs, notation.out))
            found.append(Layout(f"{x} {one.weight} -> {y}" + (f" + {one.bias}" if biased else "")))
        return tuple(found)

    def bind(self, dims: int, biased: bool) -> Bound:
        """The bound products for an input of so many dims.

        Raises:
            ShapeError: as `rows`.
        """
        rows, layouts = self.rows(dims), self.layouts(dims, biased)
        operation = CONTRACT if self.operation is None else self.operation
        given = tuple((x, size) for x, size in self.sizes if any(x in layout.letters for layout in layouts))
        parallel = self.parallel
        bound = bind(
            layouts, (biased,) * len(layouts), parallel.mesh, self.save_gathered, parallel.reduce_dtype, operation
        )
        return Bound(bound, given, rows.sequence)
