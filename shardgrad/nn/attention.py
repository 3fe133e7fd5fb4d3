"""Self-attention whose heads, a letter of its layouts, are sharded; KV heads may be shared by query heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.arguments import told
from shardgrad.comm.adjoint import replicate
from shardgrad.comm.mesh import view
from shardgrad.comm.pieces import level_of
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.cost import Collective
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.sizes import Sizes
from shardgrad.nn.heads import Heads
from shardgrad.nn.layer import Layer
from shardgrad.nn.mask import and_causal, local_mask
from shardgrad.nn.parallel import Where
from shardgrad.nn.pieces import counts, is_exact, row_pieces, row_pieces_collectives, rows_of
from shardgrad.nn.rotary import Rotary, turn
from shardgrad.ops.in_pieces import piece
from shardgrad.ops.micro_batches import is_last
from shardgrad.ops.pieces import cut, join


class Attention(
    Layer,
    layouts={
        "query": "X[b,s/sp,d] Wq[h/tp,k,d] -> Q[b,s,h/tp,k] + Bq[h/tp,k]",
        "key": "X[b,s/sp,d] Wk[g/tp,k,d] -> K[b,s,g/tp,k] + Bk[g/tp,k]",
        "value": "X[b,s/sp,d] Wv[g/tp,k,d] -> V[b,s,g/tp,k] + Bv[g/tp,k]",
        "output": "A[b,s,h/tp,k] Wo[m,h/tp,k] -> Y[b,s/sp,m] + Bo[m]",
    },
):
    """Multi-head self-attention; each rank attends with its own query heads, over the whole sequence.

    Between the products A = softmax(Q Kᵀ / √k) V is local: [b,s,h/tp,k]. Because h is a letter of its own, a head is
    never sharded, and heads need not divide by the ranks; a rank may hold none.

    Query head i attends KV head i // (H/G) of G (`num_kv_heads`), whatever the shards. Query heads are sharded as
    torch.chunk does, or balanced (`set_balanced`). Where KV heads so sharded are just those that each rank's query
    heads attend (always if the ranks divide G, or if G = H), they are stored sharded, `Wk[g/tp,k,d]`, and cost nothing
    more. Elsewhere (two KV heads on four ranks, say) they are stored replicated, `Wk[g,k,d]`, each rank computes the KV
    heads that it attends, and the gradients of key and value are summed over the ranks in one all-reduce of all G
    heads: weights, not activations, and nothing in forward.
    g/tp is then each rank's choice of KV heads, among which one that two ranks attend is found twice.

    Args:
        embed_dim: d and m.
        num_heads: H, the number of h.
        num_kv_heads: G, which divides num_heads; as many if None. 1: multi-query attention.
        head_dim: k; embed_dim / num_heads if None.
        bias: whether the four products add biases.
        causal: whether a position attends only itself and earlier ones.
        rotary: turns queries and keys by their positions, if given.
        reduce: False leaves y and dX unreduced (`Y[b,s,m]{tp}`, `X[b,s,d]{tp}`) for the caller to add to others' and
            to reduce once; see `ParallelBlock`.
        parallel, or mesh, axis, sequence_dim, data, reduce_dtype, device, dtype: as of `Parallel`; sequence_dim is 1 or
            None.

    Parameters (global shapes): query_weight [h, k, d], key_weight and value_weight [g, k, d] with biases [h, k] and
    [g, k]; output_weight [m, h, k], sharded by heads; output_bias [m], replicated.

    Raises:
        ShapeError: the numbers of heads do not divide as said, sequence_dim is neither None nor 1, or rotary is of
            another head_dim.
        LayoutError: sequence_dim is given with reduce=False.
    Source: Vaswani et al. 2017, arXiv 1706.03762; sharded by heads: Shoeybi et al. 2019, arXiv 1909.08053; shared KV
    heads: Ainslie et al. 2023, arXiv 2305.13245.
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
        reduce: bool = True,
        **where: Unpack[Where],
    ) -> None:
        super().__init__(where, reduce=reduce)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check(embed_dim, num_heads, kv_heads, head_dim, self.sequence_dim)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.causal, self.rotary = causal, rotary
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise ShapeError(f"Attention: heads have {self.head_dim} features, but rotary turns {rotary.head_dim}")
        over = view(self.mesh).axis(self.axis)
        self.heads = Heads.of(num_heads, kv_heads, over.size, over.index)
        sizes = {"h": num_heads, "g": kv_heads, "k": self.head_dim, "d": embed_dim, "m": embed_dim}
        self.build(sizes, bias=bias, unknown=() if self.heads.aligned else ("g",))
        for name in self._of_kv_heads():
            self._shardings[name] = replace(self._shardings[name], varies=(("g", self.axis),))
        self.input_layouts, self.output_layout = self.layouts(3)[:3], self.layouts(3)[3]

    def storage(self, product: str, spec: TensorSpec) -> TensorSpec:
        whole = product in ("key", "value") and not self.heads.aligned
        return spec.with_axes({"g": ()}) if whole else spec

    @told
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
            x: [b, s, d], sharded along s where `sequence_dim` says so.
            sequence_size: s over all ranks. Only of use with `sequence_dim`: the ranks otherwise exchange it at every
                call (one small exchange).
            mask: alike on every rank, over the whole sequence and all heads: broadcasts to [b, H, s, s] (query, then
                key). Boolean, True where a query attends a key; or floating, added to the scores; it may require grad.
                Besides `causal`.
            positions: where in the sequence x stands, for `rotary`: the first position, or all of them, [s] or [b, s],
                of the whole sequence.

        Shapes: x [b, s/tp, d] → y [b, s/tp, d] (or both with s whole).

        Raises:
            ShapeError: x, mask or positions do not fit.
        """
        pieces = self._pieces()
        operands = None if pieces[0].aligned else self._operands(pieces)
        sizes = {"g": len(pieces) * view(self.mesh).shape[self.axis]} if operands and is_exact(self.mesh) else None
        q, k, v = self.multiply("X", x, sequence_size, operands=operands, sizes=sizes)
        if self.rotary is not None:
            angles = self.rotary.angles(_positions(positions, q), q.dtype)
            q, k = turn(q, *angles), turn(k, *angles)
        return self.multiply("A", self._attend_in_pieces(q, k, v, mask, pieces), sequence_size)[0]

    def _pieces(self) -> list[Heads]:
        """This rank's heads; in exact mode, those of each of its pieces.

        Raises:
            LayoutError: pieces do not divide the heads, or heads that share a KV head are in part in another piece.
        """
        if not is_exact(self.mesh):
            return [self.heads]
        level, heads, groups = level_of(view(self.mesh), self.axis), self.num_heads, self.num_kv_heads
        share, each = heads // groups, heads // level.pieces
        if heads % level.pieces or (each % share and share % each):
            raise LayoutError(
                f"exact mode: {level.pieces} pieces of axis {self.axis!r} do not divide Attention's {heads} query "
                f"heads so that each has whole KV heads, or a part of one ({share} query heads share each of {groups})"
            )
        return [Heads.of(heads, groups, level.pieces, at) for at in range(*level.held())]

    def _operands(self, pieces: Sequence[Heads]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of query, key and value, of replicated KV heads those that this rank's query heads use.

        In exact mode each piece of the query heads has keys and values of its own, as it has on a rank of its own.
        """
        parameters: dict[str, Tensor] = {name: getattr(self, name) for name in self._shardings}
        shared = self._of_kv_heads()
        shardings = [self._shardings[name] for name in shared]
        whole = [parameters[name] for name in shared]
        used = row_pieces(whole, shardings, self.mesh, [(0, [self.axis])], hold=False)  # the products do
        for at, name in enumerate(shared):
            mine = [each[at].narrow(0, piece.first_kv, piece.count_kv) for each, piece in zip(used, pieces)]
            parameters[name] = mine[0] if len(mine) == 1 else torch.cat(mine)
        weights, biases = zip(*(one.names for one in self._recipes["X"].products))
        return [parameters[name] for name in weights], [parameters[name] for name in biases if name in parameters]

    def _of_kv_heads(self) -> list[str]:
        return [name for name in self._shardings if name.startswith(("key", "value"))]

    def _attend_in_pieces(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pieces: Sequence[Heads]
    ) -> Tensor:
        if not is_exact(self.mesh):
            return self._attend(q, k, v, mask, pieces[0])
        along = counts(self.mesh, [*rows_of(self.data), (2, [self.axis])], q)
        batches, found = along.get(0, 1), []
        for at, (some_q, some_k, some_v) in enumerate(zip(*(cut(x, along) for x in (q, k, v)))):
            masked = mask
            if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
                masked = piece(mask, (at // len(pieces), 0, 0, 0), (batches, 1, 1, 1))
            found.append(self._attend(some_q, some_k, some_v, masked, pieces[at % len(pieces)]))
        return join(found, along)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Heads) -> Tensor:
        """softmax(q kᵀ / √k + mask) v of some heads: q [b, s, h, k], k and v [b, s, g, k] → [b, s, h, k]."""
        shares = set(own.shares)
        grouped = shares not in (set(), {1})
        if len(shares) > 1:  # torch can only share KV heads evenly
            k, v, grouped = own.per_query(k), own.per_query(v), False
        causal = self.causal
        if mask is not None:
            if mask.requires_grad:
                mask = replicate(mask, self.mesh, self.axis)  # each rank's heads give one term of its gradient
            mask = local_mask(mask, own)
            if causal:
                mask, causal = and_causal(mask, q.shape[1]), False
            mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        if not shares:  # nothing to attend with; but backward's collectives need this rank as well
            return q + (k.sum() + v.sum() if mask is None else k.sum() + v.sum() + mask.sum())
        # [b, s, h, k] -> [b, h, s, k] and back
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return a.transpose(1, 2)

    def collectives(  # type: ignore[override]
        self, batch: int, sequence: int, dtype: Any = "float32"
    ) -> list[Collective]:
        """Every collective of this rank's forward and backward for x [batch, sequence, d], as `Layout.collectives`."""
        return super().collectives((batch, sequence, self.embed_dim), dtype)

    def global_sizes(self, shape: Sequence[int]) -> Sizes:
        sizes = super().global_sizes(shape)
        pieces = self._pieces()  # not sharded as the axis shards
        sizes.known[sizes.level("g", (self.axis,))] = sum(piece.count_kv for piece in pieces)
        return sizes

    def transfers(self, sizes: Sizes, dims: int, dtype: Any) -> Iterable[Collective]:
        shared = [] if self._pieces()[0].aligned else [self._shardings[name] for name in self._of_kv_heads()]
        over, own = [(0, [self.axis])], self.output_weight.dtype
        every = row_pieces_collectives("dWk and dWv", shared, self.mesh, over, own)
        last = is_last(view(self.mesh))
        return (row for row in every if last or row.phase == "forward")

    def extra_repr(self) -> str:
        flags = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        flags += "" if self.head_dim * self.num_heads == self.embed_dim else f", head_dim={self.head_dim}"
        flags += "" if self.output_bias is not None else ", bias=False"
        flags += "" if self.causal else ", causal=False"
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}{flags}, {self._flags()}"


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
