"""LoRA adapters of peft around a model."""

from __future__ import annotations

import warnings
from typing import Any

from shardgrad.train.config import Lora


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
