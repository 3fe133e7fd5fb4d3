"""`shardgrad train`: a training run on this machine, started by torch's own launcher."""

from __future__ import annotations

from shardgrad.cli import options, style
from shardgrad.cli import ranks as processes

EPILOG = style.examples(
    "shardgrad train quickstart",
    "shardgrad train configs/dp-tp.yaml --ranks 4 train.steps=100 run.dir=runs/mine",
)


def train(
    config: options.Config = None,
    overrides: options.Overrides = None,
    ranks: options.RanksOfMesh = None,
) -> None:
    """Train a GPT, a Llama or a model of transformers on ranks of this machine.

    The ranks are started by torchrun; on several machines, start `torchrun … -m shardgrad.train CONFIG` on each.
    `python -m shardgrad.train --help` lists every key of a configuration.
    """
    from shardgrad import shipped

    if config is None:
        style.list_shipped(shipped.names(), "what it trains")
        return
    if processes.inside():
        raise style.refuse("torchrun has started this process: start -m shardgrad.train by it, or this without it")
    read, ranks = processes.configured(config, overrides, ranks)
    from shardgrad.train.config import ConfigError
    from shardgrad.train.data import DataError
    from shardgrad.train.data import read as read_text
    from shardgrad.train.stages import stages

    with style.exit_on(ConfigError, DataError):
        for stage in stages(read, ranks):
            if stage.data.tokens is None:
                read_text(stage.data.files)
    processes.torchrun(ranks, "shardgrad.train", config, *(overrides or []))
