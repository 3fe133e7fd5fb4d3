"""One optimizer step: micro-batches, whose gradients add up; what is left partial, summed once; clipping; AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardgrad.comm.collectives import keep_chunk
from shardgrad.comm.mesh import view
from shardgrad.layout.tree import TreeSum
from shardgrad.nn.global_ops import clip_grad_norm_
from shardgrad.nn.partial_grads import all_reduce_partial_grads_
from shardgrad.nn.pieces import is_exact
from shardgrad.ops.micro_batches import micro_batches as pieces_of_step
from shardgrad.train.config import Train
from shardgrad.train.decoder import Decoder
from shardgrad.train.language_model import LanguageModel


@dataclass(frozen=True)
class Done:
    """A step's result. loss: of the whole batch, in nats a token; norm: of the gradients before clipping, if any."""

    loss: Tensor
    norm: Tensor | None


def micro_batches(
    model: LanguageModel, ids: Tensor, targets: Tensor, accumulate: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """What `LanguageModel.loss` takes of each micro-batch: ids and targets [b, s], alike on every rank → this rank's
    part of them, [b / accumulate / dp, s], and the sequences that all ranks have."""
    for some, following in zip(ids.chunk(accumulate), targets.chunk(accumulate)):
        batch = len(some)
        for name in model.token_axes:
            axis = view(model.mesh).axis(name)
            some, following = keep_chunk(some, axis, 0), keep_chunk(following, axis, 0)
        yield some, following, batch


def losses(model: LanguageModel, ids: Tensor, targets: Tensor, accumulate: int) -> Iterator[Tensor]:
    """Each micro-batch's term of the mean loss over a batch, alike on every rank. ids, targets: as of `backward`."""
    for mine in micro_batches(model, ids, targets, accumulate):
        yield model.loss(*mine) / accumulate


def backward(model: LanguageModel, ids: Tensor, targets: Tensor, accumulate: int = 1) -> Tensor:
    """Add the gradients of the mean loss over a batch, complete on every rank; returns this loss, alike on every rank.

    What each micro-batch reduces and what waits for the last of them is written in how the parameters are stored: see
    `sg.BatchAxis`. With one micro-batch nothing waits.
    """
    if is_exact(model.mesh):
        return _exact_backward(model, ids, targets, accumulate)
    total = torch.zeros((), device=ids.device)
    for loss in losses(model, ids, targets, accumulate):
        loss.backward()
        total = total + loss.detach()
    all_reduce_partial_grads_(model)
    return total


def _exact_backward(model: LanguageModel, ids: Tensor, targets: Tensor, accumulate: int) -> Tensor:
    """The same to the bit for any number of micro-batches and ranks: all are parts of one sum over all tokens."""
    assert isinstance(model, Decoder)
    total, tokens = TreeSum(accumulate, torch.add), targets.numel()
    drawn = torch.get_rng_state()
    parts = micro_batches(model, ids, targets, accumulate)
    for at, (some, following, batch) in zip(pieces_of_step(model.mesh, accumulate, *model.token_axes), parts):
        torch.set_rng_state(drawn)  # every part draws the keys of the whole batch's masks
        loss = model.loss_sum(some, following, batch, (at * batch, len(ids)))
        (loss / tokens).backward()
        total.push((at, at + 1), loss.detach())
    return total.values[0] / tokens


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, ids: Tensor, targets: Tensor, config: Train
) -> Done:
    """Forward, backward and update; ids and targets [b, s] are the whole batch, alike on every rank."""
    optimizer.zero_grad()
    loss = backward(model, ids, targets, config.accumulate)
    norm = None if config.clip is None else clip_grad_norm_(model, config.clip)
    optimizer.step()
    return Done(loss, norm)
