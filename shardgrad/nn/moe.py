"""A mixture of experts, sharded over an axis: tokens go to the ranks that own their experts, and come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from shardgrad.arguments import told
from shardgrad.comm import shim
from shardgrad.comm.adjoint import all_reduce, all_to_all_rows
from shardgrad.comm.collectives import AllToAllRows, gather_ints
from shardgrad.comm.first_derivatives import refuse_transforms
from shardgrad.comm.mesh import view
from shardgrad.comm.pieces import refuse_exact_on
from shardgrad.errors import ShapeError
from shardgrad.layout.cost import Collective
from shardgrad.layout.sizes import chunk
from shardgrad.nn.layer import Layer
from shardgrad.nn.parallel import OnAxis

_ROUND = 8  # rows are padded to a multiple, so that few shapes of products arise


class MoE(Layer):
    """A feed-forward block of many experts, of which each token uses `top_k`; no token is dropped.

        T[n/ep,d] R[e,d] -> L[n/ep,e]                router: p = softmax(L), the top_k largest are the gates
        X[e/ep,n,d] U[e/ep,f,d] -> H[e/ep,n,f]       its tokens, for each expert of this rank (G alike, from the same X)
        H[e/ep,n,f] V[e/ep,d,f] -> Y[e/ep,n,d]       H = SiLU(X Gᵀ) · X Uᵀ if gated, else GELU(X Uᵀ)
        y[n/ep,d] = Σ over a token's experts of gate · Y

    Each rank of the axis has tokens of its own, as many as it likes, and a chunk of the experts, which need not divide
    by the ranks. forward: an exchange of how many tokens go where, an all-to-all of the tokens and one back (uneven:
    what is sent is what is needed), an all-reduce of e numbers for the balance. backward: the two all-to-alls reversed,
    and the all-reduce of dR. Expert gradients need none: an expert has seen all its tokens. On a rank, an expert's rows
    are padded to those of the busiest (in memory, not on the wire), for one batched product.

    On CUDA the host waits for the device once in forward, to read the exchanged numbers, by which memory is allocated
    and the all-to-alls are sent; backward waits for nothing.

    Args:
        embed_dim, hidden_dim: d and f.
        num_experts, top_k: e, and how many of them a token uses.
        gated: SwiGLU experts, with a third weight G; otherwise GELU.
        normalize: whether a token's gates are divided by their sum (Mixtral), or are the router's probabilities as they
            are (Switch; needed with top_k = 1, where a sum of one gate would leave the router without gradient).
        parallel, or mesh, axis, device, dtype: as of `Parallel`; the axis shards the experts and the tokens.

    Parameters (global shapes): router [e, d], replicated; up and gate [e, f, d], down [e, d, f], sharded by experts.

    Raises:
        ShapeError: a size is below 1, or top_k is not between 1 and num_experts.
    Source: Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021 (Switch), arXiv 2101.03961; gates: Jiang et al.
    2024 (Mixtral), arXiv 2401.04088.
    """

    takes = OnAxis
    default_axis = "ep"

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        gated: bool = True,
        normalize: bool = True,
        **where: Unpack[OnAxis],
    ) -> None:
        super().__init__(where)
        if min(embed_dim, hidden_dim, num_experts) < 1 or not 1 <= top_k <= num_experts:
            raise ShapeError(
                f"MoE: embed_dim={embed_dim}, hidden_dim={hidden_dim}, num_experts={num_experts} must be at least 1, "
                f"and top_k={top_k} between 1 and num_experts"
            )
        self.embed_dim, self.hidden_dim, self.num_experts, self.top_k = embed_dim, hidden_dim, num_experts, top_k
        self.gated, self.normalize = gated, normalize
        products = {
            "router": "T[n/tp,d] R[e,d] -> L[n/tp,e]",
            **({"gate": "X[e/tp,n,d] Wgate[e/tp,f,d] -> Hgate[e/tp,n,f]"} if gated else {}),
            "up": "X[e/tp,n,d] Wup[e/tp,f,d] -> Hup[e/tp,n,f]",
            "down": "H[e/tp,n,f] Wdown[e/tp,d,f] -> Y[e/tp,n,d]",
        }
        self.build({"e": num_experts, "d": embed_dim, "f": hidden_dim}, products=products)

    def parameter_name(self, product: str, kind: str) -> str:
        return product if kind == "weight" else f"{product}_bias"

    @told
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The local tokens' outputs, and the balance: e · Σ_e f_e p_e, where f_e is the part of all choices that fell
        on an expert, and p_e its mean probability, both over the tokens of all ranks (1 if balanced; Switch, eq. 4).

        The balance is alike on all ranks, and counts once in the global loss: add a multiple of it to each rank's loss.

        Shapes: x [..., d], this rank's tokens → [..., d] and a scalar.
        """
        if x.dim() < 1 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"MoE: x is [..., {self.embed_dim}], not {tuple(x.shape)}")
        return self._run(x)

    @shim.eager("MoE: its shapes depend on which experts the tokens choose")
    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if shim.is_batched(x):
            refuse_transforms("MoE, whose shapes depend on which experts the tokens choose,")
        instead = "its tokens are sorted anew on every number of ranks; write the experts' products by sg.matmul"
        refuse_exact_on(self.mesh, [self.axis], "MoE", instead)
        tokens = x.reshape(-1, self.embed_dim)
        logits = self.multiply("T", tokens)[0]
        # In 16 bits, probabilities of experts would tie.
        every = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        gates, chosen = every.topk(self.top_k, -1)
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True)
        counts = self._counts(chosen)
        order = chosen.flatten().argsort(stable=True)  # choices by expert, and so by the rank that owns it
        outputs = self._experts(tokens.index_select(0, order // self.top_k), counts)
        home = outputs.index_select(0, order.argsort()).unflatten(0, gates.shape)
        y = (home * gates.unsqueeze(-1).to(home.dtype)).sum(1)
        return y.view(x.shape), self._balance(every, counts)

    def _counts(self, chosen: Tensor) -> Tensor:
        """How many choices each rank's tokens made of each expert: [ranks, e]."""
        flat = chosen.flatten()
        # torch.bincount has the host wait for the largest.
        mine = flat.new_zeros(self.num_experts).scatter_add_(0, flat, torch.ones_like(flat))
        axis = view(self.mesh).axis(self.axis)
        if axis.size == 1:
            return mine.unsqueeze(0)
        if shim.beyond_backward():  # torch.func's tensors cannot be sent
            rows = gather_ints(on_host(mine.unsqueeze(0))[0], axis, chosen.device, "exchange of token counts")
            return torch.tensor(rows, device=chosen.device)
        # All-to-all, so that a rank that is elsewhere cannot take these for the data of an all-gather, or the reverse.
        exchange = AllToAllRows(axis, [1] * axis.size, [1] * axis.size, "exchange of token counts")
        return exchange(mine.expand(axis.size, -1))

    def _experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Each row, of those sorted by expert, through its expert, wherever that is."""
        axis = view(self.mesh).axis(self.axis)
        owned = [slice(first, first + length) for first, length in (self._chunk(rank) for rank in range(axis.size))]
        known = on_host(counts)
        send = [sum(known[axis.index][part]) for part in owned]
        received = [row[owned[axis.index]] for row in known]  # [ranks, experts of this rank]
        receive = [sum(row) for row in received]
        arrived = all_to_all_rows(rows, self.mesh, self.axis, send=send, receive=receive)
        # They come by sender, then by expert; the products want them by expert, each padded to `most` rows.
        most = -(-max(map(sum, zip(*received)), default=0) // _ROUND) * _ROUND
        here = counts[:, owned[axis.index]]
        experts, total = here.shape[1], sum(receive)
        begins = torch.arange(experts, device=rows.device) * most + here.cumsum(0) - here
        lengths = here.flatten()
        first = begins.flatten() - (lengths.cumsum(0) - lengths)
        place = first.repeat_interleave(lengths, output_size=total) + torch.arange(total, device=rows.device)
        padded = arrived.new_zeros(experts * most, self.embed_dim).index_copy(0, place, arrived)
        made = self._feed_forward(padded.view(experts, most, self.embed_dim)).flatten(0, 1).index_select(0, place)
        return all_to_all_rows(made, self.mesh, self.axis, send=receive, receive=send)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """[e/ep, n, d] → [e/ep, n, d]."""
        made = self.multiply("X", x)
        hidden = F.silu(made[0]) * made[1] if self.gated else F.gelu(made[0])
        return self.multiply("H", hidden)[0]

    def _balance(self, every: Tensor, counts: Tensor) -> Tensor:
        chosen = counts.sum(0)
        total = chosen.sum().clamp(min=1).to(every)
        mean = all_reduce(every.sum(0), self.mesh, self.axis) / (total / self.top_k)
        return self.num_experts * (chosen.to(every) / total * mean).sum()

    def _chunk(self, rank: int) -> tuple[int, int]:
        return chunk(self.num_experts, view(self.mesh).shape[self.axis], rank)

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[Collective]:
        """Refuse: what is sent depends on the experts that the tokens choose.

        Raises:
            TypeError: always.
        """
        raise TypeError("MoE: what is sent depends on the experts that the tokens choose; see sg.trace_collectives")

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, hidden_dim={self.hidden_dim}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, gated={self.gated}, normalize={self.normalize}, {self._flags()}"
        )


def on_host(counts: Tensor) -> list[list[int]]:
    """What the host must know of the tokens: the one time that it waits for the device."""
    known: list[list[int]] = counts.tolist()
    return known
