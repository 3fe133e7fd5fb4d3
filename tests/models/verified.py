"""Small models of transformers with random values, on one device and parallelized, and a batch for each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.models.build import Builder

HIDDEN, HEADS, GROUPS, WIDTH, VOCAB, LENGTH = 24, 4, 2, 8, 29, 6
_LLAMA = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "intermediate_size": 20}
_COMMON = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "vocab_size": VOCAB, "max_position_embeddings": 32}
_WIDE = {**_LLAMA, "head_dim": WIDTH}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_NO_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_PICTURES = {"image_size": 16, "patch_size": 8, "num_labels": 3}
_T5 = {"d_model": HIDDEN, "d_kv": WIDTH, "d_ff": 20, "num_layers": 1, "num_heads": HEADS, "vocab_size": VOCAB}
_T5_MORE = {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0}
_MOE = {"num_experts_per_tok": 2}
_GPT2 = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "num_attention_heads": HEADS}

MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_COMMON, **_LLAMA}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_COMMON, **_LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_COMMON, **_LLAMA}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_COMMON, **_WIDE}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_COMMON, **_WIDE, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_COMMON, **_WIDE, "sliding_window": 4}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**_COMMON, **_LLAMA, "pad_token_id": 0}),
    "phi3": (
        "Phi3Config", "Phi3ForCausalLM", {**_COMMON, **_LLAMA, **_TOKENS, "original_max_position_embeddings": 32}
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_COMMON, **_GPT2}),
    "gpt_neox": (
        "GPTNeoXConfig", "GPTNeoXForCausalLM", {**_COMMON, "num_attention_heads": HEADS, "intermediate_size": 20}
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_COMMON, "num_attention_heads": HEADS, "ffn_dim": 20, "word_embed_proj_dim": HIDDEN, "dropout": 0.0},
    ),
    "bert": (
        "BertConfig", "BertForMaskedLM", {**_COMMON, **_NO_DROP, "num_attention_heads": HEADS, "intermediate_size": 20}
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": 20}
        | _NO_DROP
        | _PICTURES,
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**_T5, **_T5_MORE}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_COMMON, **_LLAMA, **_MOE, "num_local_experts": 3}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_COMMON, **_WIDE, **_MOE, "num_experts": 3, "moe_intermediate_size": 11},
    ),
}  # fmt: skip


def make(kind: str, attention: str = "sdpa", **other: Any) -> Any:
    """A model with random values, alike on every rank; `other` settings of its configuration."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config, model, settings = MODELS[kind]
    made = getattr(transformers, model)(
        getattr(transformers, config)(**{**settings, "attn_implementation": attention, **other})
    )
    if kind in ("mixtral", "qwen3_moe"):
        made.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise / 5 if parameter.dim() < 2 else noise / 6)
    return made.eval()


def batch(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Keywords of a call, with labels."""
    generator = torch.Generator().manual_seed(3)
    if kind == "vit":
        pixels = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
    ids[0, 1] = VOCAB - 1
    return {"input_ids": ids, "labels": ids[:, :5].contiguous() if kind == "t5" else ids}


def both(
    kind: str, mesh: DeviceMesh, *, sequence: bool = False, dtype: torch.dtype = torch.float32, **other: Any
) -> tuple[nn.Module, nn.Module]:
    """The parallelized model, and the one on one device."""
    plan, lora = other.pop("plan", None), other.pop("lora", False)
    single, parallel = make(kind, **other).to(dtype), make(kind, **other).to(dtype)
    if lora:
        single, parallel = adapted(single), adapted(parallel)
    # A plan that is given here is a wrong one, which parallelize refuses for architectures that it knows.
    unchecked = nullcontext() if plan is None else patch.object(Builder, "_check_known", lambda *_: None)
    with unchecked:
        sg.parallelize(parallel, mesh, plan, sequence=sequence)
    return parallel, single


def adapted(model: nn.Module) -> nn.Module:
    """With LoRA beside a column and a row parallel layer, of random values."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for a name that peft still uses
        made: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return made.eval()
