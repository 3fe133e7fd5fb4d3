"""The runs of one start: the configured one, and before it the one that makes its model, where that does not exist."""

from __future__ import annotations

from pathlib import Path

from shardgrad.train.config import Config, ConfigError, TransformersModel, check_ranks, load
from shardgrad.train.data import read
from shardgrad.train.folder import MODEL
from shardgrad.train.foreign import check


def stages(config: Config, ranks: int) -> list[Config]:
    """The configurations to run, one after the other.

    Raises:
        ConfigError, DataError: the run of model.made_by cannot be used, leaves its model somewhere else, or leaves one
            that the configured run cannot use.
    """
    section = config.model
    if not isinstance(section, TransformersModel) or section.made_by is None or section.pretrained is None:
        return [config]
    first = check_ranks(load(section.made_by), ranks)
    left = Path(first.run.dir) / MODEL
    where = f"model.made_by = {section.made_by}"
    if not isinstance(first.model, TransformersModel) or first.model.lora is not None:
        raise ConfigError(
            f"{where} leaves no model of transformers: it needs model.config, or model.pretrained without lora"
        )
    if first.model.made_by is not None:
        raise ConfigError(f"{where} has a model.made_by of its own: run {first.model.made_by} before")
    if left != Path(section.pretrained):
        raise ConfigError(f"{where} leaves its model in {left}, which model.pretrained = {section.pretrained} is not")
    if first.mesh.device != config.mesh.device:
        raise ConfigError(f"{where} has mesh.device = {first.mesh.device}, not {config.mesh.device}")
    if Path(section.pretrained).exists():
        return [config]
    if first.model.config is not None:  # what is wrong with the second run is said before the first one
        check(section.model_copy(update={"pretrained": None, "config": first.model.config}))
    if config.data.tokens is None:
        read(config.data.files)
    return [first.model_copy(update={"run": first.run.model_copy(update={"resume": "auto"})}), config]
