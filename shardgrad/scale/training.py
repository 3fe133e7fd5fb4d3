"""A step of the training program: all that scaling experiments need of shardgrad.train is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardgrad.layout.cost import Collective
from shardgrad.nn.stored import stored_parameters
from shardgrad.settings import ConfigError
from shardgrad.train.config import Config, check_ranks, load
from shardgrad.train.data import VOCAB
from shardgrad.train.loop import make_optimizer
from shardgrad.train.model import GPT
from shardgrad.train.predict import step_collectives

SIZES = {
    "layers": "model.layers",
    "heads": "model.heads",
    "d_model": "model.d_model",
    "sequence": "model.seq_len",
    "batch": "train.batch",
}


@dataclass(frozen=True)
class TrainingStep:
    step: Callable[[], None]
    predicted: list[Collective]
    flops: float
    tokens: int
    optimizer: torch.optim.Optimizer


def check(
    path: str | None, given: Sequence[str], sizes: Mapping[str, int], mesh: Mapping[str, int], dtype: str, device: str
) -> Config:
    """The training configuration of a cell.

    Raises:
        ConfigError: it cannot be used, here or on such a mesh.
    """
    assert path is not None
    unknown = [name for name in sizes if name not in SIZES]
    if unknown:
        raise ConfigError(f"sizes.{unknown[0]} is no size of a step, which has {', '.join(SIZES)}")
    overrides = [f"{SIZES[name]}={size}" for name, size in sizes.items()]
    overrides += [f"mesh.{axis}={ranks}" for axis, ranks in mesh.items()]
    return check_ranks(load(path, [*given, *overrides, f"mesh.device={device}"]), prod(mesh.values()))


def make_mesh(mesh: Mapping[str, int], device: str) -> DeviceMesh:
    return init_device_mesh(device, tuple(mesh.values()), mesh_dim_names=tuple(mesh))


def make(config: Config, mesh: DeviceMesh, dtype: torch.dtype, vocab: int = VOCAB) -> TrainingStep:
    """Forward, backward and update of the configured model on random tokens, alike on every rank."""
    sizes, batch = config.model, config.train.batch
    model = GPT(**sizes.model_dump(), vocab=vocab, mesh=mesh, dtype=dtype)
    optimizer = make_optimizer(model, config.train)
    ids, targets = torch.randint(vocab, (2, batch, sizes.seq_len), device=mesh.device_type).unbind()

    def step() -> None:
        optimizer.zero_grad()
        model.loss(ids, targets).backward()
        optimizer.step()

    tokens = batch * sizes.seq_len
    looked_up = ("embedding", "positions")
    products = sum(
        prod(stored.shape)
        for name, _, stored in stored_parameters(model)
        if stored is not None and name.endswith("weight") and not name.startswith(looked_up) and len(stored.shape) > 1
    )
    attention = 12 * sizes.layers * tokens * sizes.seq_len * sizes.d_model
    predicted = step_collectives(model, batch, sizes.seq_len, dtype)
    return TrainingStep(step, predicted, 6 * products * tokens + attention, tokens, optimizer)
