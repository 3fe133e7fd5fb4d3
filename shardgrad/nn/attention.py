"""Causal self-attention whose heads, a letter of its layouts, are cut over an axis."""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.mesh import view
from shardgrad.errors import ShapeError
from shardgrad.layout import cost
from shardgrad.layout.layout import Layout
from shardgrad.nn import init
from shardgrad.nn.module import ShardedModule
from shardgrad.ops.matmul import bind, run

_INPUTS = ("query", "key", "value")


class Attention(ShardedModule):
    """Causal multi-head self-attention; each rank attends with its own heads, over the whole sequence.

        X[b,s,d] Wq[h/tp,k,d] -> Q[b,s,h/tp,k] + Bq[h/tp,k]      key and value alike, from one gather of X
        A = softmax(Q Kᵀ / √k, causal) V                         local: [b,s,h/tp,k]
        A[b,s,h/tp,k] Wo[m,h/tp,k] -> Y[b,s,m] + Bo[m]

    forward: all-reduce of Y; backward: one all-reduce of dX, shared by the three products. With `sequence_dim=1`, X and
    Y are cut along s (`X[b,s/tp,d]`, `Y[b,s/tp,m]`): forward all-gathers X and reduce-scatters Y; backward all-gathers
    dY and X and reduce-scatters dX. Because h is a letter of its own, a head is never cut in two, and heads need not
    divide by the ranks; a rank may hold none.

    Args:
        embed_dim: d and m.
        num_heads: h, which divides embed_dim; k is their quotient.
        mesh, axis: the axis of the mesh that cuts the heads.
        sequence_dim: 1 if x arrives, and y leaves, cut along the sequence over the same axis; None if both are
            replicated.
        device, dtype: of the parameters.

    Parameters (global shapes): query_weight, key_weight, value_weight [h, k, d] with biases [h, k], cut by heads;
    output_weight [m, h, k], cut by heads; output_bias [m], replicated.

    Raises:
        ShapeError: num_heads does not divide embed_dim, or sequence_dim is neither None nor 1.
    Source: Vaswani et al. 2017, arXiv 1706.03762; cut by heads: Shoeybi et al. 2019, arXiv 1909.08053.
    """

    output_weight: Tensor
    output_bias: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mesh, (axis,))
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ShapeError(
                f"Attention: num_heads={num_heads} must divide embed_dim={embed_dim} (both at least 1): "
                "every head is as wide"
            )
        if sequence_dim not in (None, 1):
            raise ShapeError(f"Attention: x is [b, s, d], so sequence_dim is 1 or None, not {sequence_dim}")
        head_dim = embed_dim // num_heads
        self.embed_dim, self.num_heads, self.head_dim, self.axis = embed_dim, num_heads, head_dim, axis
        self.sequence_dim = sequence_dim
        s = f"s/{axis}" if sequence_dim == 1 else "s"
        self.input_layouts = tuple(
            Layout(f"X[b,{s},d] W{n}[h/{axis},k,d] -> {n.upper()}[b,s,h/{axis},k] + B{n}[h/{axis},k]") for n in "qkv"
        )
        self.output_layout = Layout(f"A[b,s,h/{axis},k] Wo[m,h/{axis},k] -> Y[b,{s},m] + Bo[m]")
        sizes = {"h": num_heads, "k": head_dim, "d": embed_dim, "m": embed_dim}
        for name, layout in zip((*_INPUTS, "output"), (*self.input_layouts, self.output_layout)):
            for kind, spec in (("weight", layout.second), ("bias", layout.bias)):
                self.declare(f"{name}_{kind}", str(spec), sizes, device, dtype)
        self._inputs = bind(self.input_layouts, (True, True, True), mesh)
        self._output = bind((self.output_layout,), (True,), mesh)
        self._input_sizes = {letter: sizes[letter] for letter in "hkd"}
        self._output_sizes = {letter: sizes[letter] for letter in "hkm"}
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Linear's initial values: uniform in ±1/√embed_dim."""
        values = partial(init.uniform, 1 / sqrt(self.embed_dim))
        for name in (*_INPUTS, "output"):
            self.fill(f"{name}_weight", values, generator)
            self.fill(f"{name}_bias", values, generator)

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y.

        Args:
            x: [b, s, d], cut along s where `sequence_dim` says so.
            sequence_size: s over all ranks. Only of use with `sequence_dim`: the ranks otherwise exchange it at every
                call (one small exchange).

        Shapes: x [b, s/tp, d] → y [b, s/tp, d] (or both with s uncut).
        """
        known = {} if sequence_size is None or self.sequence_dim is None else {"s": sequence_size}
        weights = [self.get_parameter(f"{name}_weight") for name in _INPUTS]
        biases = [self.get_parameter(f"{name}_bias") for name in _INPUTS]
        q, k, v = run(self._inputs, x, weights, biases, {**self._input_sizes, **known})
        # [b, s, h, k] -> [b, h, s, k] and back
        heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        a = heads.transpose(1, 2)
        return run(self._output, a, [self.output_weight], [self.output_bias], {**self._output_sizes, **known})[0]

    def collectives(self, batch: int, sequence: int, dtype: Any = "float32") -> list[cost.Collective]:
        """Every collective of this rank's forward and backward for x [batch, sequence, d], as `Layout.collectives`."""
        mesh_view = view(self.mesh)
        rows = {"b": batch, "s": sequence}
        inputs = self.input_layouts[0].resolve({**rows, **self._input_sizes}, mesh_view.shape, mesh_view.coordinate)
        width = cost.itemsize(dtype)
        shared = cost.collectives(
            [layout.plan for layout in self.input_layouts],
            inputs,
            bias=[True] * 3,
            needs=[("first", "second", "bias")] * 3,
            keep=(),
            wire=width,
            reduce_wire=width,
        )
        output = self.output_layout.collectives(
            {**rows, **self._output_sizes}, mesh_view.shape, dtype, coordinate=mesh_view.coordinate
        )
        return [*shared, *output]

    def extra_repr(self) -> str:
        sequence = f", sequence_dim={self.sequence_dim}" if self.sequence_dim is not None else ""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, axis={self.axis!r}{sequence}"
