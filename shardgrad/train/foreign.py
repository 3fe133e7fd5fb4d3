"""A model of transformers before it is built: what its folder or config.json says, and why it cannot be used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardgrad.errors import install, shorten
from shardgrad.models.architectures import KNOWN
from shardgrad.models.root import is_dropout
from shardgrad.settings import check_regular
from shardgrad.train import lora
from shardgrad.train.config import Config, ConfigError, TransformersModel

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_SAMPLE = 2**16


@dataclass(frozen=True)
class Foreign:
    """config: transformers' object, with its dropout set to 0. folder: of the weights, None for random ones.
    dropout: what the config had, by name. tokenizer: the folder's own, if it has one."""

    config: Any
    folder: Path | None
    dropout: Mapping[str, float]
    tokenizer: Path | None

    def make(self, device: str) -> Any:
        """The plain model in float32, with random weights; nothing of it where the device is "meta"."""
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, trust_remote_code=False)
        if self.folder is not None:
            model.name_or_path = str(self.folder.resolve())
        return model

    def digest(self) -> str:
        """A digest of the folder: its config, and of each file of weights the size and samples."""
        assert self.folder is not None
        state = hashlib.blake2b((self.folder / CONFIG).read_bytes(), digest_size=8)
        for path in sorted(self.folder.glob("*.safetensors")):
            size = path.stat().st_size
            state.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for at in range(16):
                    file.seek(max(0, size - _SAMPLE) * at // 15)
                    state.update(file.read(_SAMPLE))
        return state.hexdigest()


def describe(section: TransformersModel) -> Foreign:
    """Read what the configuration names. No code of a folder is run, and nothing is asked of a hub.

    Raises:
        ConfigError: it cannot be used: one line says why.
    """
    key, folder, path = "model.config", None, Path(section.config or "")
    if section.pretrained is not None:
        key, folder = "model.pretrained", Path(section.pretrained)
        path = folder / CONFIG
        _check_folder(folder)
    try:
        check_regular(path)
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {path} is no JSON: {error}") from None
    config = _config(values, f"{key}: {path}")
    _check_sizes(config, section, f"{key}: {path}")
    dropout = {name: value for name, value in vars(config).items() if is_dropout(name, value)}
    for name in dropout:
        setattr(config, name, 0.0)
    own = None if folder is None else folder / TOKENIZER
    return Foreign(config, folder, dropout, own if own is not None and own.is_file() else None)


def check(section: TransformersModel) -> None:
    """Besides, make the model and its adapters, without memory for them.

    Raises:
        ConfigError: as `describe`; or there are no such layers to adapt.
    """
    about = describe(section)
    if section.lora is not None:
        try:
            lora.wrap(about.make("meta"), section.lora)
        except ValueError as error:
            raise ConfigError(f"model.lora: {shorten(' '.join(str(error).split()), 500)}") from None


def with_tokenizer(config: Config) -> Config:
    """The configuration in which the tokenizer of a model's folder is that of the data, where none is named.

    Raises:
        ConfigError: as `describe`.
    """
    section = config.model
    if not isinstance(section, TransformersModel):
        return config
    own = describe(section).tokenizer
    if own is None or config.data.tokenizer is not None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(own)})})


def tokenizer_note(config: Config, about: Foreign) -> str:
    """Which tokenizer the text has, and why."""
    used = config.data.tokenizer or ("none: the ids are given" if config.data.tokens else "bytes")
    if about.tokenizer is not None and used == str(about.tokenizer):
        return f"tokenizer: that of the model, {used}"
    own = "random weights know no other" if about.folder is None else f"not that of {about.folder}"
    own = own if about.folder is None or about.tokenizer is not None else f"{about.folder} has no {TOKENIZER}"
    return f"tokenizer: {used} ({own})"


def check_vocab(config: Config, vocab: int) -> None:
    """Compare the tokens of the data with the model's.

    Raises:
        ConfigError: there are more of them than the model knows.
    """
    if isinstance(config.model, TransformersModel):
        known = int(describe(config.model).config.vocab_size)
        if vocab > known:
            name = "tokens" if config.data.tokens else "tokenizer"
            used = config.data.tokens or config.data.tokenizer or "bytes"
            raise ConfigError(
                f"data.{name} = {used} has {vocab} tokens, but the model knows {known} (vocab_size): name the "
                "tokenizer that it was trained with"
            )


def _check_folder(folder: Path) -> None:
    key = "model.pretrained"
    if not folder.is_dir():
        raise ConfigError(f"{key}: there is no folder {folder} (nothing is downloaded: name a folder on this machine)")
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(f"{key}: {folder} holds an adapter alone: merge it with its base, and name that folder")
        raise ConfigError(f"{key}: {folder} has no {CONFIG}: it is no folder in Hugging Face's format")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise ConfigError(f"{key}: {folder} has neither {' nor '.join(_WEIGHTS)}: other formats are not read")


def _config(values: Any, where: str) -> Any:
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in KNOWN:
        raise ConfigError(
            f"{where} has model_type = {shorten(repr(kind))}, of which no plan is known; known are "
            f"{', '.join(sorted(KNOWN))}"
        )
    if "quantization_config" in values:
        raise ConfigError(
            f"{where} is of a quantized model, which cannot be trained: name the folder of the one it is of"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read as transformers is imported
    try:
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    except ImportError:
        raise ConfigError(f"{where} is of a model of transformers; it is installed {install('hf')}") from None
    try:
        config = CONFIG_MAPPING[kind].from_dict({key: value for key, value in values.items() if key != "auto_map"})
    except Exception as error:  # whatever its own checks raise
        raise ConfigError(
            f"{where} is not taken by transformers: {shorten(' '.join(str(error).split()), 500)}"
        ) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or kind == "bert":
        raise ConfigError(f"{where} is of a {kind}, which is no causal language model")
    return config


def _check_sizes(config: Any, section: TransformersModel, where: str) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and section.seq_len > longest:
        raise ConfigError(f"model.seq_len = {section.seq_len} is more than the {longest} positions of {where}")
    how = KNOWN[config.model_type](config).sequence
    if section.sequence and isinstance(how, str):
        raise ConfigError(f"model.sequence = true: {how}. Set model.sequence=false")
