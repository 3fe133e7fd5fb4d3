"""A linear layer on any layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError
from shardgrad.layout import cost
from shardgrad.layout.layout import Layout
from shardgrad.nn import init
from shardgrad.nn.module import ShardedModule
from shardgrad.ops.bound import BoundMatmul
from shardgrad.ops.matmul import bind, run


class Linear(ShardedModule):
    """nn.Linear whose x, weight, y and bias are stored as a layout says: 2D, 2.5D, 3D, fully sharded, or your own.

        sg.Linear(6, 9, layout="X[b,s/tp,d] W[m/tp,d/dp] -> Y[b,s,m/tp]", mesh=mesh)

    The second operand is the weight: its letters that y lacks are the input features, those that x lacks the output
    features, in the order, and as many, as it writes. x has one dim for each letter of the first operand.

    Args:
        in_features, out_features: global sizes, over all letters of theirs.
        bias: whether to add one, stored as the layout writes it, else as `layout.bias`.
        layout: a `Layout` or its text.
        mesh: which has every axis of the layout.
        sizes: global sizes of letters: needed where several share in_features or out_features, and for letters of the
            weight that all three tensors carry; of rows, where every call has the same.
        save_gathered, reduce_dtype: as of `matmul`.
        device, dtype: of the parameters.

    Initial values are nn.Linear's distribution, by the number of the global element, whatever the mesh.

    Raises:
        LayoutError: the layout is illegal; the sizes of its letters are missing, or do not make the features; it
            writes a bias, and there is none.
        MeshError: the mesh lacks an axis.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        layout: Layout | str,
        mesh: DeviceMesh,
        sizes: Mapping[str, int] | None = None,
        save_gathered: Collection[str] = (),
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = layout if isinstance(layout, Layout) else Layout(layout)
        super().__init__(mesh, layout.axes)
        self.in_features, self.out_features, self.layout = in_features, out_features, layout
        self.sizes = dict(sizes or {})
        for letter in self.sizes:
            if letter not in layout.letters:
                raise LayoutError(f"Linear: sizes names {letter!r}, which is no letter of {layout}")
        self._complete("in_features", in_features, layout.contracted)
        self._complete("out_features", out_features, layout.columns)
        stored = {"weight": layout.rhs, "bias": layout.bias} if bias else {"weight": layout.rhs}
        for letter in (letter for spec in stored.values() for letter in spec.letters):
            if letter not in self.sizes:
                raise LayoutError(f"Linear: a parameter carries {letter!r} of {layout}: say how large it is in sizes")
        for name, spec in stored.items():
            self.declare(name, str(spec), self.sizes, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.save_gathered, self.reduce_dtype = tuple(save_gathered), reduce_dtype
        bind((layout,), (bias,), mesh, save_gathered, reduce_dtype)  # refuses what does not fit the layout
        self.reset_parameters()

    def _complete(self, name: str, features: int, letters: tuple[str, ...]) -> None:
        """Learn the size of the one letter that is not told, and check that the letters make the features."""
        missing = [letter for letter in letters if letter not in self.sizes]
        known = prod(self.sizes[letter] for letter in letters if letter in self.sizes)
        if len(missing) == 1 and features > 0 and known and features % known == 0:
            self.sizes[missing[0]] = features // known
        elif missing or known != features or features < 1:
            said = ", ".join(f"{x}={self.sizes.get(x, '?')}" for x in letters) or "no letter"
            raise LayoutError(f"Linear: {name}={features} is not what the letters of {self.layout} make: {said}")

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Linear's initial values: uniform in ±1/√in_features, of the global in_features."""
        values = partial(init.uniform, 1 / sqrt(self.in_features))
        self.fill("weight", values, generator)
        if self.bias is not None:
            self.fill("bias", values, generator)

    def forward(self, x: Tensor, sizes: Mapping[str, int] | None = None) -> Tensor:
        """The local shard of Y.

        Args:
            x: this rank's shard, stored as `layout.lhs`.
            sizes: global sizes of row letters, where the shards do not tell them: the ranks otherwise exchange them.
        """
        if torch.compiler.is_compiling():
            product = self._bound(
                None, self.layout.text, self.bias is None, self.save_gathered, self.reduce_dtype, self.mesh
            )
        else:
            product = self._products.get(None) or self._bind(None)
        known = {**self.sizes, **sizes} if sizes else self.sizes
        return run(product, x, [self.weight], [] if self.bias is None else [self.bias], known)[0]

    def _bind(self, key: None) -> BoundMatmul:
        product = bind((self.layout,), (self.bias is not None,), self.mesh, self.save_gathered, self.reduce_dtype)
        self._products[key] = product
        return product

    def collectives(self, sizes: Mapping[str, int], dtype: Any = "float32") -> list[cost.Collective]:
        """Every collective of this rank's forward and backward, given the sizes of the row letters."""
        mesh_view = view(self.mesh)
        return self.layout.collectives(
            {**self.sizes, **sizes},
            mesh_view.shape,
            dtype,
            bias=self.bias is not None,
            save_gathered=self.save_gathered,
            reduce_dtype=self.reduce_dtype,
            coordinate=mesh_view.coordinate,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"layout={str(self.layout)!r}"
        )
