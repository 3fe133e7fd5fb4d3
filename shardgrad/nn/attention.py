"""Self-attention whose heads, a letter of its layouts, are cut over an axis; KV heads may be shared by query heads."""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.adjoint import replicate
from shardgrad.comm.mesh import view
from shardgrad.errors import ShapeError
from shardgrad.layout import cost
from shardgrad.layout.batch_axis import BatchAxis, rows_over, stored_over
from shardgrad.layout.layout import Layout
from shardgrad.nn import init
from shardgrad.nn.heads import Heads
from shardgrad.nn.linear import check_reduce
from shardgrad.nn.mask import and_causal, local_mask
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.rotary import Rotary, turn
from shardgrad.nn.shared import replicate_together, summed_together
from shardgrad.ops.bound import BoundMatmul
from shardgrad.ops.matmul import bind, run

_INPUTS = ("query", "key", "value")


class Attention(ShardedModule):
    """Multi-head self-attention; each rank attends with its own query heads, over the whole sequence.

        X[b,s,d] Wq[h/tp,k,d] -> Q[b,s,h/tp,k] + Bq[h/tp,k]      one gather of X and one reduction of dX
        X[b,s,d] Wk[g/tp,k,d] -> K[b,s,g/tp,k] + Bk[g/tp,k]      for all three
        X[b,s,d] Wv[g/tp,k,d] -> V[b,s,g/tp,k] + Bv[g/tp,k]
        A = softmax(Q Kᵀ / √k) V                                 local: [b,s,h/tp,k]
        A[b,s,h/tp,k] Wo[m,h/tp,k] -> Y[b,s,m] + Bo[m]

    forward: all-reduce of Y; backward: one all-reduce of dX, shared by the three products. With `sequence_dim=1`, X and
    Y are cut along s (`X[b,s/tp,d]`, `Y[b,s/tp,m]`): forward all-gathers X and reduce-scatters Y; backward all-gathers
    dY and X and reduce-scatters dX. Because h is a letter of its own, a head is never cut in two, and heads need not
    divide by the ranks; a rank may hold none.

    Query head i attends KV head i // (H/G) of G (`num_kv_heads`), whatever the cut. Query heads are cut as torch.chunk
    cuts. Where KV heads so cut are just those that each rank's query heads attend (always if the ranks divide G, or if
    G = H), they are stored cut, `Wk[g/tp,k,d]`, and cost nothing more. Elsewhere (two KV heads on four ranks, say) they
    are stored replicated, `Wk[g,k,d]`, each rank computes the KV heads that it attends, and the gradients of key and
    value are summed over the ranks in one all-reduce of all G heads: weights, not activations, and nothing in forward.
    g/tp is then each rank's choice of KV heads, among which one that two ranks attend is found twice.

    Args:
        embed_dim: d and m.
        num_heads: H, the number of h.
        num_kv_heads: G, which divides num_heads; as many if None. 1: multi-query attention.
        head_dim: k; embed_dim / num_heads if None.
        bias: whether the four products add biases.
        causal: whether a position attends only itself and earlier ones.
        rotary: turns queries and keys by their positions, if given.
        mesh, axis: the axis of the mesh that cuts the heads.
        sequence_dim: 1 if x arrives, and y leaves, cut along the sequence over the same axis; None if both are
            replicated.
        reduce: False leaves y and dX unreduced (`Y[b,s,m]{tp}`, `X[b,s,d]{tp}`) for the caller to add to others' and
            to reduce once; see `ParallelBlock`.
        data: the axis that cuts the batch, and how parameters are stored over it; None without data parallelism.
        reduce_dtype: in which y, dX and gradients are summed, e.g. torch.float32 for 16-bit operands.
        device, dtype: of the parameters.

    Parameters (global shapes): query_weight [h, k, d], key_weight and value_weight [g, k, d] with biases [h, k] and
    [g, k]; output_weight [m, h, k], cut by heads; output_bias [m], replicated.

    Raises:
        ShapeError: the numbers of heads do not divide as said, sequence_dim is neither None nor 1, or rotary is of
            another head_dim.
        LayoutError: sequence_dim is given with reduce=False.
    Source: Vaswani et al. 2017, arXiv 1706.03762; cut by heads: Shoeybi et al. 2019, arXiv 1909.08053; shared KV heads:
    Ainslie et al. 2023, arXiv 2305.13245.
    """

    output_weight: Tensor
    output_bias: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        causal: bool = True,
        rotary: Rotary | None = None,
        mesh: DeviceMesh,
        axis: str = "tp",
        sequence_dim: int | None = None,
        reduce: bool = True,
        data: BatchAxis | None = None,
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mesh, (axis,) if data is None else (axis, data.axis))
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check(embed_dim, num_heads, kv_heads, head_dim, sequence_dim)
        check_reduce(reduce, sequence_dim, "Attention")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.causal, self.rotary, self.axis = causal, rotary, axis
        self.sequence_dim, self.reduce = sequence_dim, reduce
        self.data, self.reduce_dtype = data, reduce_dtype
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise ShapeError(f"Attention: heads have {self.head_dim} features, but rotary turns {rotary.head_dim}")
        over = view(mesh).axis(axis)
        self.heads = Heads.of(num_heads, kv_heads, over.size, over.index)
        s = f"s/{axis}" if sequence_dim == 1 else "s"
        mark = "" if reduce else f"{{{axis}}}"
        sizes = {"h": num_heads, "g": kv_heads, "k": self.head_dim, "d": embed_dim, "m": embed_dim}
        b = rows_over(data, "b")

        def weight(spec: str) -> str:
            return stored_over(data, spec, sizes)

        def plus(spec: str) -> str:
            return f" + {stored_over(data, spec, sizes, vector=True)}" if bias else ""

        self.input_layouts = tuple(
            Layout(
                f"X[{b},{s},d]{mark} {weight(f'W{n}[{h}/{axis},k,d]')} -> {n.upper()}[{b},s,{h}/{axis},k]"
                + plus(f"B{n}[{h}/{axis},k]")
            )
            for n, h in zip("qkv", "hgg")
        )
        self.output_layout = Layout(
            f"A[{b},s,h/{axis},k] {weight(f'Wo[m,h/{axis},k]')} -> Y[{b},{s},m]{mark}" + plus("Bo[m]")
        )
        for name, layout in zip((*_INPUTS, "output"), (*self.input_layouts, self.output_layout)):
            for kind, spec in (("weight", layout.rhs), ("bias", layout.bias)):
                if kind == "bias" and not bias:
                    self.register_parameter(f"{name}_bias", None)
                    continue
                whole = name in ("key", "value") and not self.heads.aligned
                storage = spec.with_axes({"g": ()}) if whole else spec
                self.declare(f"{name}_{kind}", str(storage), sizes, device, dtype)
        known = "hgkd" if self.heads.aligned else "hkd"  # of other KV heads, g is not cut as torch.chunk cuts
        self._input_sizes = {letter: sizes[letter] for letter in known}
        self._output_sizes = {letter: sizes[letter] for letter in "hkm"}
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Linear's initial values: uniform in ±1/√(features of the input)."""
        for name in (*_INPUTS, "output"):
            inputs = self.num_heads * self.head_dim if name == "output" else self.embed_dim
            values = partial(init.uniform, 1 / sqrt(inputs))
            self.fill(f"{name}_weight", values, generator)
            if self.output_bias is not None:
                self.fill(f"{name}_bias", values, generator)

    def forward(
        self,
        x: Tensor,
        sequence_size: int | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | int = 0,
    ) -> Tensor:
        """The local shard of Y.

        Args:
            x: [b, s, d], cut along s where `sequence_dim` says so.
            sequence_size: s over all ranks. Only of use with `sequence_dim`: the ranks otherwise exchange it at every
                call (one small exchange).
            mask: alike on every rank, over the whole sequence and all heads: broadcasts to [b, H, s, s] (query, then
                key). Boolean, True where a query attends a key; or floating, added to the scores; it may require grad.
                Besides `causal`.
            positions: where in the sequence x stands, for `rotary`: the first position, or all of them, [s] or [b, s],
                of the whole sequence.

        Shapes: x [b, s/tp, d] → y [b, s/tp, d] (or both with s uncut).

        Raises:
            ShapeError: x, mask or positions do not fit.
        """
        known = {} if sequence_size is None or self.sequence_dim is None else {"s": sequence_size}
        if torch.compiler.is_compiling():
            texts = [layout.text for layout in (*self.input_layouts, self.output_layout)]
            inputs, output = (self._bound(key, *texts, self.reduce_dtype, self.mesh) for key in ("inputs", "output"))
        else:
            inputs = self._products.get("inputs") or self._bind("inputs")
            output = self._products["output"]
        weights, biases = self._operands()
        q, k, v = run(inputs, x, weights, biases, {**self._input_sizes, **known})
        if self.rotary is not None:
            angles = self.rotary.angles(_positions(positions, q), q.dtype)
            q, k = turn(q, *angles), turn(k, *angles)
        a = self._attend(q, k, v, mask)
        bias = [] if self.output_bias is None else [self.output_bias]
        return run(output, a, [self.output_weight], bias, {**self._output_sizes, **known})[0]

    def _bind(self, key: str) -> BoundMatmul:
        biased = self.output_bias is not None
        self._products["inputs"] = bind(self.input_layouts, (biased,) * 3, self.mesh, (), self.reduce_dtype)
        self._products["output"] = bind((self.output_layout,), (biased,), self.mesh, (), self.reduce_dtype)
        return self._products[key]

    def _operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of query, key and value as this rank's query heads use them."""
        names = [f"{name}_{kind}" for kind in ("weight", "bias") for name in _INPUTS]
        found = [getattr(self, name) for name in names if getattr(self, name) is not None]
        if not self.heads.aligned:
            shared = [at for at in range(len(found)) if at % 3]
            whole = replicate_together([found[at] for at in shared], self.mesh, self.axis)
            for at, tensor in zip(shared, whole):
                found[at] = tensor.narrow(0, self.heads.first_kv, self.heads.count_kv)
        return found[:3], found[3:]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q kᵀ / √k + mask) v of this rank's heads: q [b, s, h, k], k and v [b, s, g, k] → [b, s, h, k]."""
        shares = set(self.heads.shares)
        grouped = shares not in (set(), {1})
        if len(shares) > 1:  # torch can only share KV heads evenly
            k, v, grouped = self.heads.per_query(k), self.heads.per_query(v), False
        causal = self.causal
        if mask is not None:
            if mask.requires_grad:
                mask = replicate(mask, self.mesh, self.axis)  # each rank's heads give one term of its gradient
            mask = local_mask(mask, self.heads)
            if causal:
                mask, causal = and_causal(mask, q.shape[1]), False
            mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        if not shares:  # nothing to attend with; but backward's collectives need this rank as well
            return q + (k.sum() + v.sum() if mask is None else k.sum() + v.sum() + mask.sum())
        # [b, s, h, k] -> [b, h, s, k] and back
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return a.transpose(1, 2)

    def collectives(self, batch: int, sequence: int, dtype: Any = "float32") -> list[cost.Collective]:
        """Every collective of this rank's forward and backward for x [batch, sequence, d], as `Layout.collectives`."""
        mesh_view = view(self.mesh)
        rows = {"b": batch, "s": sequence}
        query = {letter: self._input_sizes[letter] for letter in "hkd"}
        inputs = self.input_layouts[0].resolve({**rows, **query}, mesh_view.shape, mesh_view.coordinate)
        inputs.known[inputs.level("g", (self.axis,))] = self.heads.count_kv
        shared = self._bind("inputs").collectives(inputs, dtype)
        output = self.output_layout.collectives(
            {**rows, **self._output_sizes},
            mesh_view.shape,
            dtype,
            reduce_dtype=self.reduce_dtype,
            coordinate=mesh_view.coordinate,
        )
        if not self.heads.aligned:
            parameters = [self.get_parameter(name) for name in self._shardings if name.startswith(("key", "value"))]
            output += summed_together("dWk and dWv", parameters, self.mesh, self.axis, self.output_weight.dtype)
        return [*shared, *output]

    def extra_repr(self) -> str:
        flags = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        flags += "" if self.head_dim * self.num_heads == self.embed_dim else f", head_dim={self.head_dim}"
        flags += "" if self.output_bias is not None else ", bias=False"
        flags += "" if self.causal else ", causal=False"
        flags += "" if self.sequence_dim is None else f", sequence_dim={self.sequence_dim}"
        flags += "" if self.reduce else ", reduce=False"
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, axis={self.axis!r}{flags}"


def _check(embed_dim: int, heads: int, kv_heads: int, head_dim: int | None, sequence_dim: int | None) -> None:
    if embed_dim < 1 or heads < 1 or (head_dim is None and embed_dim % heads):
        raise ShapeError(
            f"Attention: num_heads={heads} must divide embed_dim={embed_dim} (both at least 1): every head is as wide, "
            "unless head_dim is given"
        )
    if head_dim is not None and head_dim < 1:
        raise ShapeError(f"Attention: head_dim must be at least 1, not {head_dim}")
    if kv_heads < 1 or heads % kv_heads:
        raise ShapeError(
            f"Attention: num_kv_heads={kv_heads} must divide num_heads={heads}: as many query heads share each"
        )
    if sequence_dim not in (None, 1):
        raise ShapeError(f"Attention: x is [b, s, d], so sequence_dim is 1 or None, not {sequence_dim}")


def _positions(positions: Tensor | int, q: Tensor) -> Tensor:
    batch, sequence = q.shape[:2]
    if not isinstance(positions, Tensor):
        return torch.arange(positions, positions + sequence, device=q.device)
    if tuple(positions.shape) not in ((sequence,), (batch, sequence), (1, sequence)):
        raise ShapeError(
            f"positions are those of the whole sequence, [{sequence}] or [{batch}, {sequence}], not "
            f"{tuple(positions.shape)}"
        )
    return positions
