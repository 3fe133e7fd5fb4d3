"""Whether a sharded training curve differs from one device's by the order of summation alone: measured, not guessed.

Rounding makes two right runs part: a sum done in another order differs in its last bit, and training amplifies the
difference from step to step. How far they part cannot be derived, but it can be seen: one device trains several times
the same model, its features, heads and hidden features renamed. A renaming changes no value and no equation, only the
order in which every product sums; so whatever these runs differ by, rounding alone does. A sharded run, which sums in
yet another order, is one more of the same kind, and must lie among them. A missing reduction is no rounding, and does
not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from shardgrad.train.config import Train
from shardgrad.train.decoder import Decoder
from shardgrad.train.optimizer import adamw, learning_rate
from shardgrad.train.reference import Block, Reference
from shardgrad.train.step import train_step

Batches = Callable[[int], tuple[Tensor, Tensor]]

ALLOWED = 4.0
"""How many times as far from the runs' mean as the farthest of them a sharded run may be. See `Spread.distance`."""


def renamed(reference: Reference, generator: torch.Generator) -> None:
    """Permute, in place, what a decoder's values may be permuted by without changing its function: the features of the
    residual stream, the hidden features of each feed-forward block, the groups of heads, the heads of each group."""
    width = reference.embedding.embedding_dim
    order = torch.randperm(width, generator=generator)
    with torch.no_grad():
        tables = [reference.embedding.weight, *([] if reference.positions is None else [reference.positions.weight])]
        if reference.head.weight is not reference.embedding.weight:
            tables.append(reference.head.weight)
        for table in tables:
            table.copy_(table[:, order])
        for norm in _norms(reference):
            for parameter in norm.parameters():
                parameter.copy_(parameter[order])
        for block in _blocks(reference):
            attention, mlp = block.attention, block.mlp
            share = attention.heads // attention.kv_heads
            groups = torch.randperm(attention.kv_heads, generator=generator)
            members = torch.stack([torch.randperm(share, generator=generator) for _ in groups])
            heads = (groups.unsqueeze(1) * share + members).flatten()
            hidden = torch.randperm(mlp.up.out_features, generator=generator)
            size = attention.query.out_features // attention.heads
            for linear, rows in (
                (attention.query, _of_heads(heads, size)),
                (attention.key, _of_heads(groups, size)),
                (attention.value, _of_heads(groups, size)),
                *((linear, hidden) for linear in (mlp.up, mlp.gate) if linear is not None),
            ):
                _permute(linear, rows, order)
            _permute(attention.output, order, _of_heads(heads, size))
            _permute(mlp.down, order, hidden)


def _blocks(reference: Reference) -> Iterator[Block]:
    for block in reference.blocks:
        assert isinstance(block, Block)
        yield block


def _norms(reference: Reference) -> Iterator[torch.nn.Module]:
    for block in _blocks(reference):
        yield from (block.attention_norm, block.mlp_norm)
    yield reference.norm


def _of_heads(heads: Tensor, size: int) -> Tensor:
    """The features of heads of `size` features each, head by head."""
    return (heads.unsqueeze(1) * size + torch.arange(size)).flatten()


def _permute(linear: torch.nn.Linear, rows: Tensor, columns: Tensor) -> None:
    linear.weight.copy_(linear.weight[rows][:, columns])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias[rows])


def reference_curve(
    reference: Reference, batches: Batches, config: Train, compute_dtype: torch.dtype | None = None
) -> list[float]:
    """Train a reference in place for `config.steps` as the loop trains a sharded model; the loss of each step.

    batches: ids and targets [b, s] of a step. Micro-batches are taken one after the other, as a sharded run takes them.
    """
    optimizer = adamw(((name, p, p.dim() > 1) for name, p in reference.named_parameters()), config)
    losses = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad()
        total = 0.0
        for ids, targets in zip(*(tensor.chunk(config.accumulate) for tensor in batches(step))):
            loss = reference.loss(ids, targets, compute_dtype) / config.accumulate
            loss.backward()
            total += float(loss.detach())
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), config.clip)
        optimizer.step()
        losses.append(total)
    return losses


@dataclass(frozen=True)
class Spread:
    """Curves of one training that differ by the order of summation alone: some number of runs, each step by step."""

    curves: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> list[float]:
        return [sum(losses) / len(losses) for losses in zip(*self.curves)]

    def distance(self, curve: Sequence[float]) -> float:
        """How far a curve is from the runs' mean, in units of the farthest run: the largest over all steps.

        At each step the unit is the largest distance that any run has had from the mean so far, at least one unit of
        float32 roundoff of the loss, to which every run rounds it. Distances grow over a run, so the early steps, where
        a unit is small, show most. By construction each of the runs is at a distance of at most 1. NaN and steps that
        are missing are infinitely far.
        """
        if len(curve) != len(self.mean) or not all(map(isfinite, curve)):
            return inf
        unit, farthest = 0.0, 0.0
        for losses, mean, loss in zip(zip(*self.curves), self.mean, curve):
            floor = torch.finfo(torch.float32).eps * abs(mean)
            unit = max(unit, floor, *(abs(other - mean) for other in losses))
            farthest = max(farthest, abs(loss - mean) / unit)
        return farthest


def sharded_curve(model: Decoder, optimizer: torch.optim.Optimizer, batches: Batches, config: Train) -> list[float]:
    """Train a sharded model in place, as `reference_curve` does one device's; called on every rank."""
    losses = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        losses.append(float(train_step(model, optimizer, *batches(step), config).loss))
    return losses


def spread(
    make: Callable[[], Reference],
    batches: Batches,
    config: Train,
    *,
    runs: int = 8,
    compute_dtype: torch.dtype | None = None,
) -> Spread:
    """Train on one device `runs` times, each time under other names.

    make: makes the reference, always with the same values.
    """
    curves = []
    for run in range(runs):
        reference = make()
        if run:
            renamed(reference, torch.Generator().manual_seed(run))
        curves.append(tuple(reference_curve(reference, batches, config, compute_dtype)))
    return Spread(tuple(curves))
