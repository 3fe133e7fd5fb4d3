"""Ids drawn from logits over a sharded vocabulary: the same on every rank, by a few numbers a token.

Probabilities are counted in whole numbers (e^(z − max) in units of some 2⁻⁴⁵), whose sums do not depend on order, and
uniform numbers are a function of seed and token (`counter`): so a draw does not depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.collectives import AllGather, AllReduce
from shardgrad.comm.mesh import Axis
from shardgrad.errors import DisagreementError
from shardgrad.layout.sizes import chunk
from shardgrad.nn.counter import bits64
from shardgrad.nn.largest import largest
from shardgrad.nn.vocabulary import Vocabulary

_BLOCK = 2**22  # elements of a rank's part that are looked at at a time: some 100 MB


@shim.eager("how often ranks draw depends on what they draw")
@torch.no_grad()
def draw(logits: Tensor, vocabulary: Vocabulary, seed: int, top_k: int | None, top_p: float | None) -> Tensor:
    """One id for each token, [...]; see `VocabParallelLogits.sample`.

    Raises:
        DisagreementError: ranks have different seeds.
        ValueError: logits are NaN or +∞, or −∞ alone; on every rank.
    """
    over = vocabulary.over
    seed %= 2**63
    _agree(seed, over, logits.device)
    tokens, most = logits.shape[:-1].numel(), chunk(vocabulary.size, over.size, 0)[1]
    flat = logits.reshape(tokens, logits.shape[-1])
    each = max(1, _BLOCK // most)
    found = []
    for first in range(0, tokens, each):
        rows = flat[first : first + each]
        uniform = _uniform(seed, tokens, first, rows)
        z = vocabulary.read(rows)
        if top_k is None:
            found.append(_of_all(z, vocabulary, top_p, uniform))
        else:
            found.append(_of_largest(z, vocabulary, min(top_k, vocabulary.size), top_p, uniform))
    ids = torch.cat(found) if found else flat.new_empty(0, dtype=torch.int64)
    return ids.view(logits.shape[:-1])


def _of_largest(z: Tensor, vocabulary: Vocabulary, k: int, top_p: float | None, uniform: Iterator[Tensor]) -> Tensor:
    values, ids = largest(z, vocabulary, k)
    top = values[:, 0]
    _refuse(~top.isfinite())
    weights = _weights(values, top, vocabulary)
    if top_p is not None:
        before = weights.cumsum(-1) - weights
        weights = weights * (before < top_p * weights.sum(-1, keepdim=True).double())
    until = weights.cumsum(-1)
    return ids.gather(-1, _place(until, _target(next(uniform), until[:, -1])).unsqueeze(-1)).squeeze(-1)


def _of_all(z: Tensor, vocabulary: Vocabulary, top_p: float | None, uniform: Iterator[Tensor]) -> Tensor:
    """By the inverse of the cumulative distribution; for top_p, by rejection.

    Let tokens be ordered by probability. Outside of the nucleus are those before which there is p already, and a draw
    that is one of them is rejected: what is accepted is distributed as within the nucleus. The next draw is from what
    comes before the rejected one, so every round leaves less (Ye et al. 2025, FlashInfer, arXiv 2501.01005, has it so
    for one device).
    """
    over, (start, here) = vocabulary.over, vocabulary.part
    own = z.amax(-1) if here else z.new_full(z.shape[:-1], -torch.inf)
    top, wrong = _all_reduce(
        torch.stack([own.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), own.isnan().to(own.dtype)]),
        over,
        "all-reduce of maxima",
        dist.ReduceOp.MAX,
    ).unbind()
    _refuse((wrong != 0) | ~top.isfinite())
    weights = _weights(z, top, vocabulary)
    left = weights
    ids: Tensor | None = None
    whole = None
    done = torch.zeros_like(top, dtype=torch.bool)
    places = torch.arange(start, start + here, device=z.device)
    while True:
        until = left.cumsum(-1)
        mass = until[:, -1] if here else until.new_zeros(len(z))
        masses = (
            mass.unsqueeze(0)
            if over.size == 1
            else AllGather(over, 0, over.size, "all-gather of masses")(mass.unsqueeze(0))
        )
        total = masses.sum(0)
        whole = total if whole is None else whole
        target = _target(next(uniform), total) - masses[: over.index].sum(0)
        mine = (target >= 0) & (target < mass)
        drawn = z.new_zeros((2, len(z)), dtype=torch.float64)  # id and z: of other ranks 0
        if here:
            place = _place(until, target.clamp(min=0)).clamp(max=here - 1)
            value = z.gather(-1, place.unsqueeze(-1)).squeeze(-1)
            drawn = torch.stack([start + place, value.double()]).masked_fill(~mine, 0)
        drawn = _all_reduce(drawn, over, "all-reduce of what was drawn")
        now, value = drawn[0].long(), drawn[1].to(z.dtype).unsqueeze(-1)
        ids = now if ids is None else torch.where(done, ids, now)
        if top_p is None:
            return ids
        before = (z > value) | ((z == value) & (places < now.unsqueeze(-1)))
        ahead = _all_reduce((weights * before).sum(-1), over, "all-reduce of the mass before")
        done = done | (ahead < top_p * whole.double())
        if bool(done.all()):
            return ids
        left = weights * before


def _weights(z: Tensor, top: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Probabilities as whole numbers whose sum over the vocabulary is below 2⁶³; the largest's are at least 2⁴⁰ for all
    vocabularies below 2²¹."""
    unit = 2.0 ** min(52, 62 - vocabulary.size.bit_length())
    return (z.double() - top.double().unsqueeze(-1)).exp_().mul_(unit).round_().long()


def _uniform(seed: int, tokens: int, first: int, rows: Tensor) -> Iterator[Tensor]:
    """For each round, numbers in [0, 1) for some tokens of all."""
    round = 0
    while True:
        bits = bits64(seed, (2**31, tokens), (round, first), (1, len(rows)))[0]
        yield torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).to(rows.device)
        round += 1


def _target(uniform: Tensor, total: Tensor) -> Tensor:
    """The unit of mass that is drawn, of so many."""
    return torch.minimum((uniform * total.double()).long(), total - 1)


def _place(until: Tensor, target: Tensor) -> Tensor:
    """The first one up to and with which there is more than the target."""
    return torch.searchsorted(until, target.unsqueeze(-1), right=True).squeeze(-1)


def _all_reduce(x: Tensor, over: Axis, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    return x if over.size == 1 else AllReduce(over, what, op)(x)


def _agree(seed: int, over: Axis, device: torch.device) -> None:
    ends = _all_reduce(torch.tensor([seed, -seed], device=device), over, "comparison of seeds", dist.ReduceOp.MAX)
    if over.size > 1 and int(ends[0]) != -int(ends[1]):
        raise DisagreementError(
            f"the ranks of {over} sample with different seeds, {-int(ends[1])} to {int(ends[0])}: give all the "
            "same seed=, or generators seeded alike of which none draws more than another"
        )


def _refuse(wrong: Tensor) -> None:
    if bool(wrong.any()):
        raise ValueError(
            f"logits of token {int(wrong.nonzero()[0])} cannot be sampled: they hold NaN or +inf, or -inf alone (a "
            "temperature near 0? argmax() takes the likeliest)"
        )
