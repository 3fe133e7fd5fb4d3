"""LoRA adapters of a sharded model and peft's files: by which names they lie there, and the model without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.nn.shardings import named_shardings

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has wrapped a model."""
    return hasattr(model, "get_base_model") and bool(getattr(model, "peft_config", None))


def names_in_files(model: Any) -> dict[str, str]:
    """peft's names of the adapters' tensors, by those of the model's parameters.

    Raises:
        ValueError: the model has several adapters, or some of another kind than LoRA's.
    """
    from peft import get_peft_model_state_dict

    configs = model.peft_config
    if len(configs) != 1 or model.active_adapter not in configs or configs[model.active_adapter].peft_type != "LORA":
        kinds = ", ".join(f"{name} ({one.peft_type})" for name, one in configs.items())
        raise ValueError(f"one adapter of LoRA's kind can be read and written, not {kinds}: model.delete_adapter(name)")
    # peft chooses and renames; by identity it is seen which is which.
    tensors = {name: torch.empty(0) for name, _ in model.named_parameters()}
    chosen = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    names = {id(tensor): name for name, tensor in tensors.items()}
    return {names[id(tensor)]: file_name for file_name, tensor in chosen.items()}


def write_config(model: Any, folder: Path) -> None:
    """adapter_config.json, as peft writes it."""
    config = model.peft_config[model.active_adapter]
    before, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = before


@contextmanager
def unwrapped(base: Any) -> Iterator[None]:
    """Inside the block a model is as it was without adapters: names and modules are those of its files."""
    layers = [(name, one) for name, one in base.named_modules() if hasattr(one, "base_layer")]
    about = base.__dict__.pop("peft_config", None)
    for name, wrapper in layers:
        _put(base, name, wrapper.base_layer)
    try:
        yield
    finally:
        for name, wrapper in layers:
            _put(base, name, wrapper)
        if about is not None:
            base.peft_config = about


def _put(base: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, own = name.rpartition(".")
    setattr(base.get_submodule(owner), own, module)


@torch.no_grad()
def reset_adapters(model: nn.Module, seed: int, device: torch.device, *, only_meta: bool = False) -> None:
    """Give the adapters peft's initial values, the same on any mesh: A uniform (Kaiming, a = √5), B zeros.

    only_meta: leave those that have values.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter, sharding in named_shardings(model):
        if ".lora_" not in name:
            continue
        whole: Tensor = torch.zeros(
            parameter.shape if sharding is None else sharding.global_shape, dtype=parameter.dtype
        )
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(whole, a=sqrt(5), generator=generator)
        if parameter.is_meta or not only_meta:
            local = whole if sharding is None else sharding.shard(whole)
            owner, _, key = name.rpartition(".")
            made = nn.Parameter(local.to(device), requires_grad=parameter.requires_grad)
            model.get_submodule(owner)._parameters[key] = made
