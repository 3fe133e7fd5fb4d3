"""A linear layer on any layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any, Unpack

from torch import Tensor

from shardgrad.arguments import told
from shardgrad.errors import LayoutError
from shardgrad.layout.cost import Collective
from shardgrad.layout.layout import Layout
from shardgrad.nn.layer import Layer
from shardgrad.nn.parallel import OnMesh


class Linear(Layer):
    """nn.Linear whose x, weight, y and bias are stored as a layout says: 2D, 2.5D, 3D, fully sharded, or your own.

        sg.Linear(6, 9, layout="X[b,s/tp,d] W[m/tp,d/dp] -> Y[b,s,m/tp]", mesh=mesh)

    The second operand is the weight: its letters that y lacks are the input features, those that x lacks the output
    features, in the order, and as many, as it writes. x has one dim for each letter of the first operand.

    Args:
        in_features, out_features: global sizes, over all letters of theirs.
        bias: whether to add one, stored as the layout writes it, else as `layout.bias`.
        layout: a `Layout` or its text.
        sizes: global sizes of letters: needed where several share in_features or out_features, and for letters of the
            weight that all three tensors carry; of rows, where every call has the same, so that an x that was not
            sharded is an error, not the shard of a larger one.
        save_gathered: as of `matmul`.
        parallel, or mesh, reduce_dtype, device, dtype: as of `Parallel`; the axes are the layout's.

    Initial values are nn.Linear's distribution, by the number of the global element, whatever the mesh.

    Raises:
        LayoutError: the layout is illegal; the sizes of its letters are missing, or do not make the features; it
            writes a bias, and there is none.
        MeshError: the mesh lacks an axis.
    """

    weight: Tensor
    bias: Tensor | None
    takes = OnMesh

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        layout: Layout | str,
        sizes: Mapping[str, int] | None = None,
        save_gathered: Collection[str] = (),
        **where: Unpack[OnMesh],
    ) -> None:
        layout = layout if isinstance(layout, Layout) else Layout(layout)
        super().__init__(where, save_gathered=save_gathered, axes=layout.axes)
        self.in_features, self.out_features, self.layout = in_features, out_features, layout
        self.sizes = dict(sizes or {})
        for letter in self.sizes:
            if letter not in layout.letters:
                raise LayoutError(f"Linear: sizes names {letter!r}, which is no letter of {layout}")
        self._complete("in_features", in_features, layout.contracted)
        self._complete("out_features", out_features, layout.columns)
        stored = (layout.rhs, layout.bias) if bias else (layout.rhs,)
        for letter in (letter for spec in stored for letter in spec.letters):
            if letter not in self.sizes:
                raise LayoutError(f"Linear: a parameter carries {letter!r} of {layout}: say how large it is in sizes")
        self.build(self.sizes, bias=bias, products={"": layout})
        self._bind(layout.lhs.name, len(layout.lhs.dims), bias)  # refuses what does not fit the layout

    def _complete(self, name: str, features: int, letters: tuple[str, ...]) -> None:
        """Learn the size of the one letter that is not given, and check that the letters make the features."""
        missing = [letter for letter in letters if letter not in self.sizes]
        known = prod(self.sizes[letter] for letter in letters if letter in self.sizes)
        if len(missing) == 1 and features > 0 and known and features % known == 0:
            self.sizes[missing[0]] = features // known
        elif missing or known != features or features < 1:
            said = ", ".join(f"{x}={self.sizes.get(x, '?')}" for x in letters) or "no letter"
            raise LayoutError(f"Linear: {name}={features} is not what the letters of {self.layout} make: {said}")

    @told
    def forward(self, x: Tensor, sizes: Mapping[str, int] | None = None) -> Tensor:
        """The local shard of Y.

        Args:
            x: this rank's shard, stored as `layout.lhs`.
            sizes: global sizes of row letters, where the shards do not give them: the ranks otherwise exchange them.
        """
        return self.multiply(self.layout.lhs.name, x, sizes=sizes)[0]

    def collectives(self, sizes: Mapping[str, int], dtype: Any = "float32") -> list[Collective]:  # type: ignore[override]
        """Every collective of this rank's forward and backward, given the sizes of the row letters."""
        return self._of_products(self.resolve({**self._sizes, **sizes}), len(self.layout.lhs.dims), dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"layout={str(self.layout)!r}"
        )
