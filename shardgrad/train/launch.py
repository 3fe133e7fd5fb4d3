"""From a command line to a finished run, on every rank that torchrun started, or alone without it."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardgrad.checkpoint import save
from shardgrad.comm.agree import agree
from shardgrad.comm.backend import choose
from shardgrad.comm.mesh import view
from shardgrad.errors import CollectiveError, DisagreementError, VerificationError
from shardgrad.nn.stored import stored_parameters
from shardgrad.train import data, folder
from shardgrad.train.config import Config, ConfigError, check_ranks, keys, load
from shardgrad.train.first_step import CheckError, check_first_step
from shardgrad.train.generate import generate
from shardgrad.train.loop import TrainingError, make_optimizer, train
from shardgrad.train.metrics import Metrics, draw
from shardgrad.train.model import GPT
from shardgrad.train.report import Report

_GRACE_S = 10.0  # how long the other ranks leave the first one to tell what is wrong, and torchrun to end them all


def main(arguments: Sequence[str]) -> int:
    """Train as the configuration says; returns the exit status: 0, or 2 if the configuration cannot be used.

    What goes wrong after the ranks have met ends the process at once, with status 1: threads of the backend may still
    wait for a rank that is gone, and would keep the interpreter from ending.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config_path, overrides = _parse(arguments, rank)
        config = check_ranks(load(config_path, overrides), ranks)
        _check_device(config)
        text = data.part(data.read(config.data.files), config.data.held_out, config.model.seq_len)
        where = folder.create(config.run.dir) if rank == 0 else None
        if where is not None:
            (where / folder.CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    except (ConfigError, data.DataError, OSError) as error:
        _tell_once(error, rank)
        return 2
    try:
        _run(_meet(config), config, text, where)
    except CollectiveError as error:  # every rank knows something else
        _end(error)
    except (CheckError, TrainingError, VerificationError, DisagreementError, OSError) as error:
        _tell_once(error, rank)
        _end()
    # Threads of the backend end with the process group's last reference; one alive at exit may abort the interpreter.
    dist.destroy_process_group()
    gc.collect()
    return 0


def _tell_once(error: Exception, rank: int) -> None:
    """Print what all ranks have found: the first at once; the others later, if the first did not end them by ending."""
    if rank:
        time.sleep(_GRACE_S)
    print(error, file=sys.stderr, flush=True)


def _end(error: Exception | None = None) -> NoReturn:
    if error is not None:
        print(error, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def _parse(arguments: Sequence[str], rank: int) -> tuple[str, list[str]]:
    described = []
    for key, field in keys():
        default = "required" if field.is_required() else f"default {field.default!r}"
        described.append(f"  {key:<20} {field.description} ({default})")
    parser = _Parser(
        usage="torchrun --standalone --nproc-per-node N launch/train.py CONFIG.yaml [section.key=value ...]",
        description="Train a byte-level GPT, tensor and sequence parallel over N ranks.",
        epilog="keys:\n" + "\n".join(described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("config", nargs="?", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values instead of the file's")
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    given = parser.parse_intermixed_args(arguments)
    if given.help:
        if rank == 0:
            parser.print_help()
        sys.exit(0)
    if given.config is None:
        parser.error("the configuration is missing")
    return given.config, given.overrides


def _check_device(config: Config) -> None:
    if config.mesh.device == "cuda":
        here = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.device_count() <= here:
            raise ConfigError(
                f"mesh.device = cuda, but there are {torch.cuda.device_count()} GPUs for local rank {here}"
            )
        torch.cuda.set_device(here)


def _meet(config: Config) -> DeviceMesh:
    """Start the process group and the mesh. Without torchrun's environment: a group of this process alone."""
    backend = choose(config.mesh.device)
    timeout = timedelta(seconds=config.mesh.timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return init_device_mesh(config.mesh.device, (dist.get_world_size(),), mesh_dim_names=("tp",))


def _run(mesh: DeviceMesh, config: Config, text: data.Text, where: Path | None) -> None:
    """All of a run. where: the run folder, on the first rank alone, which alone writes to it."""
    report = Report(shown=where is not None)
    mesh_view = view(mesh)
    meant = f"{config.to_yaml()}text {text.digest}"
    agree(mesh_view, mesh_view.axis("tp"), lambda: meant, "the configuration or the text")
    torch.manual_seed(config.run.seed)
    model = GPT(**config.model.model_dump(), vocab=data.VOCAB, mesh=mesh)
    with Metrics(where and where / folder.METRICS) as metrics:
        if where is not None:
            report.say(f"run folder: {where}")
        report.layouts(model)
        count = sum(prod(stored.shape) for _, _, stored in stored_parameters(model) if stored is not None)
        report.say(
            f"{count / 1e6:.2f} million parameters; {len(text.train):,} bytes to train on, "
            f"{len(text.held_out):,} held out"
        )
        check_first_step(model, config, text, report, metrics)
        optimizer = make_optimizer(model, config.train)
        history = train(model, optimizer, config, text, report, metrics)
        sample = generate(
            model,
            config.sample.prompt.encode(),
            config.sample.bytes,
            temperature=config.sample.temperature,
            seed=config.run.seed,
        ).decode(errors="replace")
        if config.sample.bytes:
            report.sample(sample)
        step = config.train.steps
        metrics.write(
            "end",
            step=step,
            held_out=history.held_out[-1][1],
            tokens_per_second=history.tokens_per_second,
            communication_share=history.communication_share,
            seconds=report.elapsed(),
        )
        if where is not None:
            (where / folder.SAMPLE).write_text(sample, encoding="utf-8")
            draw(where / folder.PICTURE, history.train, history.held_out)
        save_to = where / folder.CHECKPOINT if where is not None else Path(folder.CHECKPOINT)
        save(save_to, model, optimizer, mesh=mesh, state={"step": step})
        report.say(
            f"held-out loss [bold]{history.held_out[-1][1]:.3f}[/bold] nats a byte after {step} steps in "
            f"{report.elapsed():.0f} s: {history.tokens_per_second:,.0f} tokens/s, "
            f"{history.communication_share:.0%} of the training time communicating"
        )
        if where is not None:
            report.left(where, sorted(entry.name for entry in where.iterdir()))
