"""LoRA adapters of peft around a model: their initial values, the model without them, and peft's folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.nn.shardings import named_shardings
from shardgrad.train.config import Lora

ADAPTER = "adapter_model.safetensors"
_NAME = "default"  # peft's, of the only adapter


def wrap(base: Any, settings: Lora) -> Any:
    """A model with adapters, which alone are trained.

    Raises:
        ValueError: it has no such layers, or peft has no choice for its architecture.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # an int in its annotation alone
        target_modules=settings.targets,
        lora_dropout=settings.dropout,
        fan_in_fan_out=base.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(base, config)


@torch.no_grad()
def reset(model: nn.Module, seed: int, device: torch.device) -> None:
    """Give the adapters peft's initial values, the same on any mesh: A uniform (Kaiming, a = √5), B zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter, sharding in named_shardings(model):
        if not parameter.requires_grad:
            continue
        whole = torch.zeros(parameter.shape if sharding is None else sharding.global_shape, dtype=parameter.dtype)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(whole, a=sqrt(5), generator=generator)
        local = whole if sharding is None else sharding.shard(whole)
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._parameters[key] = nn.Parameter(local.to(device))


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
def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' whole tensors, by peft's names, on the CPU; called on every rank."""
    from peft import get_peft_model_state_dict

    whole = {
        name: (parameter.detach() if sharding is None else sharding.unshard(parameter)).cpu().contiguous()
        for name, parameter, sharding in named_shardings(model)
        if parameter.requires_grad
    }
    return get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)


def write(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """The folder that `peft.PeftModel.from_pretrained` reads, beside the base; on one rank."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    config = model.peft_config[_NAME]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False
