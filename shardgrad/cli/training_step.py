"""One step of the training program, for commands that look at it: all that they need of shardgrad.train is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import record_function

from shardgrad.comm.backend import choose
from shardgrad.comm.rendezvous import start_process_group
from shardgrad.comm.watch import Watch
from shardgrad.draw.timeline import PHASES, STEP
from shardgrad.nn.partial_grads import all_reduce_partial_grads_
from shardgrad.train.build import build, mesh_shape
from shardgrad.train.config import Config, ConfigError, check_ranks, decoder_sizes, load
from shardgrad.train.data import BYTES
from shardgrad.train.memory import check_memory
from shardgrad.train.step import micro_batches


def read(path: str, overrides: Sequence[str], ranks: int) -> Config:
    """The configuration, on so many ranks.

    Raises:
        ConfigError: it cannot be used, here or on so many.
    """
    config = check_ranks(load(path, overrides), ranks, by_option=True)
    decoder_sizes(config)
    if config.mesh.device != "cpu":
        raise ConfigError(f"mesh.device = {config.mesh.device}: a step is looked at on the CPU; add mesh.device=cpu")
    check_memory(config, ranks, ranks)
    return config


def join(config: Config) -> tuple[int, Watch]:
    """Meet the other ranks that torchrun started, or be alone; returns this rank, and what to tell that it leaves."""
    watch = start_process_group(choose("cpu"), timedelta(seconds=config.mesh.timeout_s))
    return dist.get_rank(), watch


def make(config: Config) -> Callable[[], None]:
    """A function that runs one step (forward, backward, optimizer) of the configured model on random tokens.

    Its parts bear the names of `shardgrad.draw.timeline` in a profile.
    """
    shape = mesh_shape(config)
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    torch.manual_seed(config.run.seed)
    model = build(config, BYTES, mesh)
    ids, targets = torch.randint(BYTES, (2, config.train.batch, config.model.seq_len)).unbind()
    mine = next(micro_batches(model, ids, targets, config.train.accumulate))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.train.lr)
    forward, backward, update = PHASES

    def step() -> None:
        with record_function(STEP):
            optimizer.zero_grad()
            with record_function(forward):
                loss = model.loss(*mine)
            with record_function(backward):
                loss.backward()
                all_reduce_partial_grads_(model)
            with record_function(update):
                optimizer.step()

    return step
