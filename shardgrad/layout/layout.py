"""`Layout`: the face of this room. A legal layout, what the rule reads from it, and its derived plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

from shardgrad.arguments import TellingType, told
from shardgrad.errors import LayoutError
from shardgrad.layout.notation import TensorSpec, parse
from shardgrad.layout.plan import Plan, derive
from shardgrad.layout.rule import Illegal, Reading, read
from shardgrad.layout.sizes import Sizes

if TYPE_CHECKING:
    from shardgrad.layout.cost import Collective
    from shardgrad.layout.schedule import Instructions


class Layout(metaclass=TellingType):
    """How two operands and their product are stored, and with that how Y, dX, dW and db are computed.

        Layout("X[n,d] W[d,m/tp] -> Y[n,m/tp]")

    Letters and names are yours; `/axis` after a letter shards it over the mesh axis (major first); `{axis}` after a
    tensor leaves a sum over the axis to the caller; `+ B[…]` adds a bias. `layout["X"]` is how X is stored.

    A convolution is the same product with windows that slide along the last `spatial` dims of each tensor. Their
    letters stand in one tensor each, for their sizes differ, and no axis splits them:

        Layout("X[b,c,h,w] W[o/tp,c,i,j] -> Y[b,o/tp,p,q]", spatial=2)

    Attributes:
        lhs, rhs, out, bias: the tensors, as `TensorSpec`. Where no bias is written, `bias` is the default one.
        has_bias: whether the layout writes a bias.
        splits: for each mesh axis, the letter that it splits.
        rows, contracted, columns, batched: the letters by role.
        spatial: how many dims of each tensor a convolution slides along; 0 for a product.

    Raises:
        LayoutError: with the layout, a caret under the letter or axis, the reason and the nearest legal layouts.
    """

    __slots__ = ("_hash", "bias", "has_bias", "lhs", "out", "plan", "reading", "rhs", "spatial", "text")

    text: str
    lhs: TensorSpec
    rhs: TensorSpec
    out: TensorSpec
    bias: TensorSpec
    has_bias: bool
    spatial: int
    reading: Reading
    plan: Plan

    def __init__(self, text: str, *, spatial: int = 0) -> None:
        notation = parse(text)._replace(spatial=spatial)
        try:
            reading = read(notation)
        except Illegal as wrong:
            from shardgrad.layout.nearest import refusal

            raise LayoutError(refusal(text, notation, wrong)) from None
        self.text = str(notation)
        self.lhs, self.rhs, self.out = notation.lhs, notation.rhs, notation.out
        self.has_bias = notation.bias is not None
        self.spatial = spatial
        self.bias = reading.bias
        self.reading = reading
        self.plan = derive(notation, reading)
        self._hash = hash((self.text, spatial))

    @property
    def splits(self) -> Mapping[str, str]:
        return self.reading.splits

    @property
    def rows(self) -> tuple[str, ...]:
        return self.reading.rows

    @property
    def contracted(self) -> tuple[str, ...]:
        return self.reading.contracted

    @property
    def columns(self) -> tuple[str, ...]:
        return self.reading.columns

    @property
    def batched(self) -> tuple[str, ...]:
        return self.reading.batched

    @property
    def axes(self) -> tuple[str, ...]:
        """Every mesh axis that the layout mentions."""
        return tuple(self.reading.splits)

    @property
    def letters(self) -> tuple[str, ...]:
        """Every letter, in the order of first appearance."""
        return tuple(dict.fromkeys((*self.lhs.letters, *self.rhs.letters, *self.out.letters)))

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Both operands, the product, and the bias (as written, or the default one)."""
        return self.lhs, self.rhs, self.out, self.bias

    @told
    def __getitem__(self, name: str) -> TensorSpec:
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise LayoutError(f"no tensor {name!r} in {self}: it has {', '.join(t.name for t in self.tensors)}")

    def explain(self) -> str:
        """In words and formulas, for forward, dX, dW and db: what is computed locally, what is communicated where."""
        from shardgrad.layout.explain import explain

        notation = parse(self.text)._replace(spatial=self.spatial)
        return explain(notation, self.reading, self.plan)

    @told
    def collectives(
        self,
        sizes: Mapping[str, int],
        mesh_shape: Mapping[str, int],
        dtype: Any = "float32",
        *,
        bias: bool | None = None,
        frozen: Collection[str] = (),
        save_gathered: Collection[str] = (),
        reduce_dtype: Any = None,
        coordinate: Mapping[str, int] | None = None,
    ) -> list[Collective]:
        """Every collective of forward and backward, in order, with the bytes that one rank sends.

        Args:
            sizes: the global size of every letter.
            mesh_shape: the number of ranks along every axis that the layout mentions.
            dtype: of the operands; torch, NumPy, or a name.
            bias: whether a bias is added; by default, whether the layout writes one.
            frozen: names of operands (and bias) that need no gradient.
            save_gathered: names of operands kept as gathered in forward, rather than gathered again for backward.
            reduce_dtype: in which partial sums are reduced, if not in dtype.
            coordinate: the rank in question, as its index on each axis; by default the first one of each axis. Only
                uneven sizes make a difference between ranks.

        A layer called without `sizes` may exchange them first; that is not listed here.

        Raises:
            LayoutError: a size, an axis or a name is missing or unknown.
        """
        from shardgrad.layout import predict

        return predict.collectives(
            self, self.resolve(sizes, mesh_shape, coordinate), dtype, bias, frozen, save_gathered, reduce_dtype
        )

    @told
    def instructions(
        self,
        mesh_shape: Mapping[str, int],
        *,
        bias: bool | None = None,
        frozen: Collection[str] = (),
        save_gathered: Collection[str] = (),
    ) -> Instructions:
        """Forward and then backward, as one list of instructions in the order of the mathematics.

        Arguments and errors as of `collectives`; of the ranks it is the first of each axis.
        """
        from shardgrad.layout import predict

        sizes = self.resolve(dict.fromkeys(self.letters, 1), mesh_shape)
        return predict.instructions(self, sizes, bias, frozen, save_gathered)

    @told
    def program(
        self,
        mesh_shape: Mapping[str, int] | None = None,
        *,
        bias: bool | None = None,
        frozen: Collection[str] = (),
        save_gathered: Collection[str] = (),
        dtype: Any = "float32",
        reduce_dtype: Any = None,
        coordinate: Mapping[str, int] | None = None,
    ) -> str:
        """The Python that `matmul` runs for this layout: `forward`, and `backward` for autograd, as text.

        Names such as `all_gather_x_tp` stand for collectives that are built once, `start` and `wait` for their two
        halves; `linear`, `matmul` and `addmm` are torch's. Sizes do not change it.

        Args:
            mesh_shape: the number of ranks along every axis that the layout mentions: along an axis of one rank nothing
                is sent. None: every axis has several.
            bias, frozen, save_gathered: as of `collectives`.
            dtype, reduce_dtype: of the operands, and the one in which partial sums are reduced, if it is another.
            coordinate: the rank in question, as of `collectives`. It matters for a bias on a partial product alone,
                which one rank adds.

        Raises:
            LayoutError: as `collectives`.
        """
        from shardgrad.layout import predict

        shape = dict.fromkeys(self.axes, 2) if mesh_shape is None else mesh_shape
        sizes = self.resolve(dict.fromkeys(self.letters, 1), shape, coordinate)
        return predict.program(self, sizes, bias, frozen, save_gathered, dtype, reduce_dtype)

    @told
    def resolve(
        self, sizes: Mapping[str, int], mesh_shape: Mapping[str, int], coordinate: Mapping[str, int] | None = None
    ) -> Sizes:
        """Global sizes as one rank's `Sizes`, checked against this layout.

        Raises:
            LayoutError: a letter or an axis that the layout has is missing, or a size or an index is out of range.
        """
        coordinate = dict.fromkeys(mesh_shape, 0) | dict(coordinate or {})
        for letter in self.letters:
            if letter not in sizes:
                raise LayoutError(f"sizes lacks letter {letter!r} of {self}: it has {dict(sizes)}")
        for letter, size in sizes.items():
            if letter not in self.letters:
                raise LayoutError(f"sizes names {letter!r}, but {self} has the letters {', '.join(self.letters)}")
            if not isinstance(size, Integral) or size < 0:
                raise LayoutError(f"size {size!r} of letter {letter!r} is not a number of elements")
        for axis in self.axes:
            if axis not in mesh_shape:
                raise LayoutError(f"the mesh {dict(mesh_shape)} lacks axis {axis!r} of {self}")
        for axis, ranks in mesh_shape.items():
            if ranks < 1 or not 0 <= coordinate[axis] < ranks:
                raise LayoutError(f"axis {axis!r}: index {coordinate[axis]} is not one of {ranks} ranks")
        return Sizes(mesh_shape, coordinate, {(letter, ()): size for letter, size in sizes.items()})

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Layout({self.text!r}{f', spatial={self.spatial}' if self.spatial else ''})"

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Layout) and self.text == other.text and self.spatial == other.spatial

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Callable[..., Layout], tuple[str]]:
        return partial(Layout, spatial=self.spatial), (self.text,)
