"""AdamW on this rank's shards, and its learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, pi

import torch
from torch import nn

from shardgrad.nn.shardings import named_shardings
from shardgrad.train.config import Train


def make_optimizer(model: nn.Module, config: Train) -> torch.optim.AdamW:
    """AdamW, which is elementwise: each rank keeps the moments of its own shards, in their dtype, and needs no other's.

    Weight decay on matrices alone, embeddings among them; none on biases and on the parameters of norms. What needs no
    gradient is left out.
    """
    return adamw(
        (
            (name, one, len(one.shape if sharding is None else sharding.global_shape) > 1)
            for name, one, sharding in named_shardings(model)
            if one.requires_grad
        ),
        config,
    )


def adamw(parameters: Iterable[tuple[str, nn.Parameter, bool]], config: Train) -> torch.optim.AdamW:
    """AdamW for parameters by name, each with whether it has more than one dim as a whole.

    Some biases have: those of attention are [heads, features].
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter, several_dims in parameters:
        (decayed if several_dims and not name.endswith("bias") else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def learning_rate(config: Train, step: int) -> float:
    """At step 0, 1, …: rises linearly over `warmup` steps to `lr`, then falls by half a cosine to `min_lr` times it."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + cos(pi * done)))
