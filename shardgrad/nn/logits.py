"""Logits whose vocabulary is sharded over an axis, as a distribution of tokens: log-probabilities, entropy, divergence,
the largest, and samples, without whole logits anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import TellingType, told
from shardgrad.comm.adjoint import along
from shardgrad.comm.mesh import axis_on, view
from shardgrad.comm.pieces import pieces_here, refuse_exact_on
from shardgrad.errors import ShapeError
from shardgrad.layout.sizes import chunks
from shardgrad.nn.init import draw_seed
from shardgrad.nn.largest import Largest, largest
from shardgrad.nn.sampling import draw
from shardgrad.nn.token_statistics import statistics
from shardgrad.nn.token_sums import Asked, Values
from shardgrad.nn.vocabulary import Vocabulary, check_reading, masked


class VocabParallelLogits(metaclass=TellingType):
    """What whole logits would give, from logits that are sharded over an axis: alike on every rank of it.

        policy = sg.VocabParallelLogits(logits, vocab_size=v, mesh=mesh)
        policy.log_prob(tokens), policy.entropy(), policy.kl_div(reference)

    All but `argmax` and `sample` is differentiable as torch's own on whole logits is (the gradient of the logits is
    that of each rank's part), in float32 for 16-bit logits. Every rank goes on with the same numbers, and so gives them
    the same gradients. Tokens are rows: they may be any part of a batch or of a sequence, but alike on the axis.

    Communicated are, in forward, two all-reduces: of the maximum, and of one sum for each number (one more for the sum
    of exponentials); `statistics` has several numbers for the same two. Backward has none.

    Args:
        logits: [..., vocab_size / ranks], this rank's part, as the axis shards; only read.
        vocab_size: the global vocabulary, v.
        mesh, axis: the axis of the mesh that shards the vocabulary.
        temperature, soft_cap: read z = soft_cap · tanh(logits / soft_cap) / temperature for the logits.
        token_axes: axes over which ranks hold different tokens. Exact mode (`sg.set_exact`) needs to know.

    Raises:
        ShapeError: the logits are whole already, or do not fit `vocab_size`.
        ValueError: temperature or soft_cap is not a positive number.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        vocab_size: int,
        mesh: DeviceMesh,
        axis: str = "tp",
        temperature: float = 1.0,
        soft_cap: float | None = None,
        token_axes: str | Sequence[str] = (),
    ) -> None:
        check_reading(temperature, soft_cap)
        over = axis_on(mesh, axis, "VocabParallelLogits")
        self.logits, self.mesh = logits, mesh
        self.vocabulary = Vocabulary(
            vocab_size, over, float(temperature), None if soft_cap is None else float(soft_cap)
        )
        self.vocabulary.check(logits)
        self._token_axes = (token_axes,) if isinstance(token_axes, str) else tuple(token_axes)

    @told
    def statistics(
        self,
        tokens: Tensor | None = None,
        *,
        logsumexp: bool = False,
        entropy: bool = False,
        mean_log_prob: bool = False,
        kl: VocabParallelLogits | None = None,
        ignore_index: int = -100,
    ) -> Values:
        """Several numbers from one pass and two all-reduces; None for those not asked for.

        Args:
            tokens: for `log_prob`; see there.
            mean_log_prob: over the vocabulary, as label smoothing needs.
            kl: the other logits, for KL(self ‖ other) (see `kl_div`).

        Raises:
            ShapeError: tokens or other logits do not fit.
            IndexError: a token is outside the vocabulary.
            ValueError: nothing was asked for.
        """
        if tokens is None and not (logsumexp or entropy or mean_log_prob or kl is not None):
            raise ValueError("statistics of nothing: give tokens, or ask for logsumexp, entropy, mean_log_prob or kl")
        several, chosen = False, None
        if tokens is not None:
            several = self._several(tokens)
            chosen = masked(tokens if several else tokens.unsqueeze(-1), ignore_index)
        other = None if kl is None else self._comparable(kl)
        asked = Asked(self.vocabulary, logsumexp, entropy, mean_log_prob, None if kl is None else kl.vocabulary)
        blocks = 1
        if not torch.compiler.is_compiling():
            blocks = prod(pieces_here(view(self.mesh), name) for name in self._token_axes)
        values = statistics(self.logits, asked, chosen, other, blocks)
        if values.log_prob is None or several:
            return values
        return values._replace(log_prob=values.log_prob.squeeze(-1))

    def log_prob(self, tokens: Tensor, *, ignore_index: int = -100) -> Tensor:
        """log p of chosen tokens, in the shape of `tokens`.

        Args:
            tokens: ids of the whole vocabulary, one for each token [...], or several [..., k]; alike on every rank.
            ignore_index: such an id's is 0, without a gradient.

        Raises:
            ShapeError, IndexError: as of `statistics`.
        """
        return _there(self.statistics(tokens, ignore_index=ignore_index).log_prob)

    def logsumexp(self) -> Tensor:
        """log Σ exp z over the vocabulary, [...]. Its square is the z-loss (Chowdhery et al. 2022, PaLM)."""
        return _there(self.statistics(logsumexp=True).logsumexp)

    def entropy(self) -> Tensor:
        """−Σ p log p in nats, [...]; where p is 0, p log p is."""
        return _there(self.statistics(entropy=True).entropy)

    def kl_div(self, other: VocabParallelLogits) -> Tensor:
        """KL(self ‖ other) = Σ p (log p − log q) in nats, [...], with gradients of both; ∞ where q is 0 and p is not.

        other: logits of the same tokens and vocabulary, with their own temperature and dtype.
        """
        return _there(self.statistics(kl=other).kl)

    def log_softmax(self) -> Tensor:
        """This rank's part of log p, [..., v/ranks]. Backward has one all-reduce, of a number a token."""
        if self.logits.requires_grad and torch.is_grad_enabled():
            instead = "take log_prob, whose gradient needs no sum, or no gradient"
            refuse_exact_on(self.mesh, [self.vocabulary.over.name], "the gradient of log_softmax", instead)
        log_sum = along("replicate", self.logsumexp(), self.vocabulary.over)
        return self.vocabulary.read(self.logits) - log_sum.unsqueeze(-1)

    @told
    def topk(self, k: int) -> Largest:
        """The k largest z (temperature and soft cap applied) and their ids, [..., k] each, largest first.

        Of equal ones the lowest id comes first. The values are differentiable. Gathered are k candidates of each rank.

        Raises:
            ValueError: k is not between 1 and the vocabulary.
        """
        _check_k(k, self.vocabulary.size)
        return largest(self.vocabulary.read(self.logits), self.vocabulary, k)

    def argmax(self) -> Tensor:
        """The id of the largest, [...]; of several the lowest. A greedy sample."""
        with torch.no_grad():
            return self.topk(1).ids.squeeze(-1)

    @told
    def sample(
        self,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """One id for each token, [...], drawn from the softmax of z: the same on every rank of the axis, whatever their
        number.

        Args:
            seed: of this call; ranks that hold other tokens take another one. Else it is drawn from `generator`
                (torch's CPU generator by default), which ranks must have seeded alike. Seeds are compared.
            top_k: from the k likeliest alone (of equal ones, those of lower ids).
            top_p: from the nucleus alone, the fewest likeliest tokens that have p together; of the `top_k`, if given.

        Communicates the maximum, the ranks' masses and what was drawn; with top_k, its candidates instead. top_p alone
        draws again while it draws outside of the nucleus, about 1/p times or fewer, with one more number a token each.

        Raises:
            DisagreementError: the ranks' seeds differ.
            ValueError: logits are NaN or +∞ or −∞ alone, or an argument is out of its range.
        Source: Holtzman et al. 2019, arXiv 1904.09751 (nucleus).
        """
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        if top_k is not None:
            _check_k(top_k, None)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
        key = draw_seed(generator) if seed is None else seed
        return draw(self.logits, self.vocabulary, key, top_k, top_p)

    def __repr__(self) -> str:
        return f"VocabParallelLogits({tuple(self.logits.shape)} of {self.vocabulary.size}, {self.vocabulary.over})"

    def _several(self, tokens: Tensor) -> bool:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"tokens must hold integer ids, got {tokens.dtype}")
        rows = self.logits.shape[:-1]
        if tokens.shape != rows and tokens.shape[:-1] != rows:
            raise ShapeError(
                f"tokens have shape {tuple(tokens.shape)}, logits {tuple(self.logits.shape)}: expected {tuple(rows)}, "
                "or that with one more dim for several ids"
            )
        return tokens.shape != rows

    def _comparable(self, other: VocabParallelLogits) -> Tensor:
        mine, its = self.vocabulary, other.vocabulary
        alike = mine.size == its.size and mine.over == its.over and self.logits.shape == other.logits.shape
        # Axes that shard otherwise are equal, and on some ranks the parts are: all ranks must come to the same end.
        if not alike or chunks(mine.size, mine.over.size) != chunks(its.size, its.over.size):
            raise ShapeError(
                f"kl of {self!r} and {other!r}: both must be of the same tokens and vocabulary, over the same axis, "
                "which shards alike (sg.set_balanced)"
            )
        return other.logits


def _there(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _check_k(k: int, most: int | None) -> None:
    if k < 1 or (most is not None and k > most):
        raise ValueError(
            f"k must lie between 1 and the vocabulary of {most}, not {k}" if most else f"top_k is {k}, below 1"
        )
