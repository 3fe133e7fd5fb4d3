"""A step of the training program: all that scaling experiments need of shardgrad.train is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.layout.cost import Collective
from shardgrad.nn.shardings import named_shardings
from shardgrad.scale.cell import STEP, Cell
from shardgrad.train.build import build, mesh_shape
from shardgrad.train.config import Config, check_ranks, decoder_sizes, load
from shardgrad.train.data import BYTES
from shardgrad.train.grid import AXES as GRID
from shardgrad.train.memory import least_bytes as least_bytes
from shardgrad.train.optimizer import make_optimizer
from shardgrad.train.predict import step_collectives
from shardgrad.train.step import train_step


@dataclass(frozen=True)
class TrainingStep:
    """step: forward, backward and update; the rest as of `Work`."""

    step: Callable[[], None]
    predicted: list[Collective]
    flops: float
    tokens: int
    optimizer: torch.optim.Optimizer


def read(cell: Cell, sizes: Mapping[str, int], ranks: int) -> Config:
    """The training configuration of a cell of so many ranks, with these sizes in place of its own, its ranks resolved.

    Raises:
        ConfigError: it cannot be used, here or on such a mesh.
    """
    assert cell.train is not None
    mesh, overrides = cell.mesh, [f"{STEP[name]}={size}" for name, size in sizes.items()]
    if mesh is not None and set(mesh) == set(GRID):
        overrides.append(f"mesh.grid={[mesh[axis] for axis in GRID]}")
    elif mesh is not None:
        overrides += [f"mesh.{axis}={size}" for axis, size in {"dp": 1, "tp": 1, **mesh}.items()]
    if not cell.sequence_parallel:
        overrides.append("mesh.sequence_parallel=false")
    overrides += [f"mesh.device={cell.device}", f"train.dtype={cell.dtype}"]
    config = check_ranks(load(cell.train, [*cell.set, *overrides]), ranks)
    decoder_sizes(config)
    return config


def shape(config: Config) -> dict[str, int]:
    """The mesh of a configuration whose ranks are resolved."""
    return mesh_shape(config)


def parts(config: Config) -> list[tuple[str, int, tuple[str, ...]]]:
    """What ranks share out among them: a name, its global size, the axes that shard it."""
    model = decoder_sizes(config)
    grid = config.mesh.grid is not None
    return [
        ("sequence", config.train.batch // config.train.accumulate, ("z",) if grid else ("dp",)),
        ("position", model.seq_len, ("y",) if grid else ("tp",) if config.mesh.sequence_parallel else ()),
        ("head", model.heads, ("y", "x") if grid else ("tp",)),
    ]


def make(config: Config, mesh: DeviceMesh) -> TrainingStep:
    """Forward, backward and update of the configured model on random tokens, alike on every rank."""
    sizes, settings = decoder_sizes(config), config.train
    vocab = config.data.vocab or BYTES
    model = build(config, vocab, mesh)
    optimizer = make_optimizer(model, settings)
    ids, targets = torch.randint(vocab, (2, settings.batch, sizes.seq_len)).to(mesh.device_type).unbind()

    def step() -> None:
        train_step(model, optimizer, ids, targets, settings)

    tokens = settings.batch * sizes.seq_len
    multiplied = 0
    for name, _, sharding in named_shardings(model):
        looked_up = name.startswith(("embedding", "positions")) and not (sizes.tied and name.startswith("embedding"))
        if sharding is not None and len(sharding.shape) > 1 and not name.endswith("bias") and not looked_up:
            multiplied += prod(sharding.shape)
    attention = 12 * sizes.layers * tokens * sizes.seq_len * sizes.d_model
    predicted = step_collectives(
        model, settings.batch, sizes.seq_len, accumulate=settings.accumulate, clip=settings.clip is not None
    )
    return TrainingStep(step, predicted, 6 * multiplied * tokens + attention, tokens, optimizer)
