"""Numbers of each token's distribution over a sharded vocabulary: all of them from one pass and two small reductions.

With z as `Vocabulary` reads it, m the maximum of z over the vocabulary, d = z − m, e = exp d and Σ over the whole
vocabulary (y, m', d', e' of the other logits likewise), each number is made of sums, which ranks add in one all-reduce:

| number        | sums                | value                        | gradient of z                            |
| ------------- | ------------------- | ---------------------------- | ---------------------------------------- |
| logsumexp     | S = Σ e             | m + log S                    | p = e / S                                |
| log_prob      | d at the id         | d − log S                    | 1 at the id − p                          |
| mean_log_prob | Σ d                 | Σ d / v − log S              | 1 / v − p                                |
| entropy       | Σ e d               | log S − Σ e d / S            | −p (log p + entropy)                     |
| kl            | Σ e (d − d'), S'    | Σ e (d − d') / S − log S + log S' | p (log p − log q − kl); of y: q − p |

Nothing here is differentiable, and nothing but the two reductions communicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import Axis, view, view_of
from shardgrad.comm.pieces import exact, level_of, reduce_pieces_collectives
from shardgrad.layout.cost import Collective, itemsize, sent
from shardgrad.nn.exact_loss import sums_of_pieces
from shardgrad.nn.pieces import is_exact
from shardgrad.nn.vocabulary import Vocabulary, wider


@dataclass(frozen=True, slots=True)
class Asked:
    """Which numbers are wanted besides `log_prob`, which is where ids are given.

    other: how the second logits are stored, to which KL(p ‖ q) is wanted.
    """

    vocabulary: Vocabulary
    logsumexp: bool = False
    entropy: bool = False
    mean: bool = False
    other: Vocabulary | None = None


class Values(NamedTuple):
    """[...] each and [..., k] log_prob, alike on every rank, float32 at least; None where not asked for.

    log_prob: of chosen ids, 0 for an id that is none. mean_log_prob: over the vocabulary.
    """

    log_prob: Tensor | None = None
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    mean_log_prob: Tensor | None = None
    kl: Tensor | None = None


class Saved(NamedTuple):
    """[...] each: maximum and S, of z and of y; for the gradient."""

    top: Tensor
    mass: Tensor
    other_top: Tensor | None = None
    other_mass: Tensor | None = None


def forward(
    logits: Tensor, asked: Asked, chosen: Tensor | None = None, other: Tensor | None = None, blocks: int = 1
) -> tuple[Values, Saved]:
    """The numbers of each token, and what the gradient needs besides.

    Args:
        logits: [..., v/ranks], only read.
        chosen: [..., k] of ids of the whole vocabulary, alike on every rank; of others nothing is chosen.
        other: the second logits, stored as `asked.other` says.
        blocks: the pieces of the tokens, in exact mode.
    """
    over = asked.vocabulary.over
    z = asked.vocabulary.read(logits)
    y = None if other is None or asked.other is None else asked.other.read(other)
    if y is not None:
        z, y = wider(z, y)
    tops = _maxima([z] if y is None else [z, y], over).unbind()
    d = _below(z, tops[0], logits)
    dy = None if y is None or other is None else _below(y, tops[1], other)
    picked = [] if chosen is None else list(_picked(d, asked.vocabulary, chosen).movedim(-1, 0).unbind())
    names: list[str] = []

    def terms() -> Iterator[Tensor]:
        for name, term in _terms(d, dy, asked):
            names.append(name)
            yield term

    what = "all-reduce of sums over the vocabulary"
    if exact(view_of(over)) is None:
        sums = torch.stack([*picked, *[term.sum(-1) for term in terms()]])
        sums = sums if over.size == 1 else AllReduce(over, what)(sums)
    else:
        sums = sums_of_pieces(picked, terms(), asked.vocabulary.size, over, blocks, what)
    found = dict(zip(names, sums[len(picked) :].unbind()))
    saved = Saved(tops[0], found["mass"], None if y is None else tops[1], found.get("other mass"))
    return _values(found, sums[: len(picked)], saved, asked, chosen), saved


def _values(found: dict[str, Tensor], picked: Tensor, saved: Saved, asked: Asked, chosen: Tensor | None) -> Values:
    log_mass = saved.mass.log()
    log_prob = logsumexp = entropy = mean = kl = None
    if chosen is not None:
        log_prob = (picked - log_mass).movedim(0, -1).masked_fill(~_valid(chosen, asked.vocabulary), 0)
    if asked.logsumexp:  # as torch's where z is infinite
        logsumexp = torch.where(saved.top.isinf(), saved.top, saved.top + log_mass)
    if asked.entropy:
        entropy = log_mass - found["entropy"] / saved.mass
    if asked.mean:
        mean = found["mean"] / asked.vocabulary.size - log_mass
    if saved.other_mass is not None:
        kl = found["kl"] / saved.mass - log_mass + saved.other_mass.log()
    return Values(log_prob, logsumexp, entropy, mean, kl)


def gradient(
    logits: Tensor,
    asked: Asked,
    values: Values,
    saved: Saved,
    grads: Values,
    chosen: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, stored as they are, for that of each number (None: of nothing). Arguments as of
    `forward`, with what it returned.

    A token into which only zeros flow back gets zeros, even where its logits are not finite.
    """
    log_mass, inverse = saved.mass.log(), 1 / saved.mass
    d = _below(_as(asked.vocabulary.read(logits), saved.top), saved.top, logits)
    constant: list[Tensor] = []  # which p is multiplied by
    flows: list[Tensor] = []
    dp: Tensor | None = None  # what e is multiplied by beyond that
    hit = None
    if grads.logsumexp is not None:
        constant.append(grads.logsumexp)
        flows.append(grads.logsumexp != 0)
    if grads.log_prob is not None and chosen is not None:
        hit = grads.log_prob.masked_fill(~_valid(chosen, asked.vocabulary), 0)
        constant.append(-hit.sum(-1))
        flows.append((hit != 0).any(-1))
    if grads.mean_log_prob is not None:
        constant.append(-grads.mean_log_prob)
        flows.append(grads.mean_log_prob != 0)
    if grads.entropy is not None and values.entropy is not None:
        constant.append(grads.entropy * (log_mass - values.entropy))
        flows.append(grads.entropy != 0)
        dp = d * (-grads.entropy * inverse).unsqueeze(-1)
    if grads.kl is not None and values.kl is not None:
        assert other is not None
        flows.append(grads.kl != 0)
        constant.append(grads.kl * (_log_ratio(saved) - values.kl))
        term = (d - _other_below(other, asked, saved)).mul_((grads.kl * inverse).unsqueeze(-1))
        dp = term if dp is None else dp.add_(term)
    weight = (reduce(torch.add, constant) * inverse).unsqueeze(-1)
    if dp is None:
        dz = d.exp_().mul_(weight)
    else:
        e = d.exp_()
        dz = dp.add_(weight).mul_(e).masked_fill_(e == 0, 0)
    if grads.mean_log_prob is not None:
        dz.add_((grads.mean_log_prob / asked.vocabulary.size).unsqueeze(-1))
    if hit is not None and chosen is not None and dz.shape[-1]:
        local, mine = asked.vocabulary.places(chosen)
        dz.scatter_add_(-1, local, hit.masked_fill(~mine, 0))
    idle = ~reduce(torch.logical_or, flows)
    return asked.vocabulary.pull_back(dz, logits).masked_fill_(idle.unsqueeze(-1), 0)


def other_gradient(logits: Tensor, other: Tensor, asked: Asked, saved: Saved, grad: Tensor) -> Tensor:
    """The gradient of the second logits for that of kl; as `gradient`."""
    assert asked.other is not None
    assert saved.other_mass is not None
    p = _below(_as(asked.vocabulary.read(logits), saved.top), saved.top, logits).exp_()
    q = _other_below(other, asked, saved).exp_()
    dy = q.mul_((grad / saved.other_mass).unsqueeze(-1)).sub_(p.mul_((grad / saved.mass).unsqueeze(-1)))
    return asked.other.pull_back(dy, other).masked_fill_((grad == 0).unsqueeze(-1), 0)


def statistics_collectives(
    tokens: int,
    dtype: Any,
    *,
    mesh: DeviceMesh,
    axis: str = "tp",
    chosen: int = 0,
    entropy: bool = False,
    mean: bool = False,
    kl: bool = False,
    what: str = "statistics",
) -> list[Collective]:
    """Every collective of `forward`, over this rank's tokens; `gradient` has none.

    Args:
        tokens: on this rank.
        dtype: of the logits, the wider one of both for kl.
        chosen: how many ids a token.
    """
    mesh_view, width = view(mesh), max(itemsize(dtype), itemsize("float32"))
    over, sums = mesh_view.axis(axis), tokens * (1 + chosen + entropy + mean + 2 * kl)
    counts = [("maxima", tokens * (1 + kl)), *([] if is_exact(mesh) else [("sums", sums)])]
    found = [
        Collective(
            "forward", "all-reduce", f"{what}: {name}", axis, sent("all-reduce", n, over.size, over.index) * width
        )
        for name, n in counts
        if over.size > 1 and n
    ]
    if is_exact(mesh):
        found += reduce_pieces_collectives(
            "forward", f"{what}: sums", sums, width, [level_of(mesh_view, axis)], mesh_view
        )
    return found


def _maxima(parts: list[Tensor], over: Axis) -> Tensor:
    """Over the whole vocabulary, [parts, ...]."""
    empty = not parts[0].shape[-1]
    own = [z.new_full(z.shape[:-1], -torch.inf) if empty else z.amax(-1) for z in parts]
    stacked = torch.stack(own)
    return stacked if over.size == 1 else AllReduce(over, "all-reduce of maxima", dist.ReduceOp.MAX)(stacked)


def _below(z: Tensor, top: Tensor, logits: Tensor) -> Tensor:
    """z − its maximum; in the place of z where that is not the logits."""
    return z - top.unsqueeze(-1) if z is logits else z.sub_(top.unsqueeze(-1))


def _as(z: Tensor, top: Tensor) -> Tensor:
    return z.to(top.dtype)


def _other_below(other: Tensor, asked: Asked, saved: Saved) -> Tensor:
    assert asked.other is not None
    assert saved.other_top is not None
    return _below(_as(asked.other.read(other), saved.other_top), saved.other_top, other)


def _log_ratio(saved: Saved) -> Tensor:
    assert saved.other_mass is not None
    return saved.other_mass.log() - saved.mass.log()


def _valid(ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    return (ids >= 0) & (ids < vocabulary.size)


def _picked(d: Tensor, vocabulary: Vocabulary, chosen: Tensor) -> Tensor:
    local, mine = vocabulary.places(chosen)
    if not d.shape[-1]:
        return d.new_zeros(chosen.shape)
    return d.gather(-1, local).masked_fill(~mine, 0)


def _terms(d: Tensor, dy: Tensor | None, asked: Asked) -> Iterator[tuple[str, Tensor]]:
    """What is summed over the vocabulary, one after the other: d and dy are overwritten on the way."""
    if asked.mean:
        yield "mean", d
    e = d.exp() if asked.entropy or dy is not None else d.exp_()
    yield "mass", e
    nothing = e == 0 if asked.entropy or dy is not None else e  # times a logarithm of −∞ is 0
    if asked.entropy:
        yield "entropy", (e * d).masked_fill_(nothing, 0)
    if dy is not None:
        yield "kl", d.sub_(dy).mul_(e).masked_fill_(nothing, 0)
        yield "other mass", dy.exp_()
