"""Small models of transformers, with random parameters, and their parameters spread over ranks in uneven parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.layout.notation import parse_tensor
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.sharding import ParamSharding

_DECODER = {"vocab_size": 53, "hidden_size": 20, "intermediate_size": 27, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 5, "num_key_value_heads": 5}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BIG = {**_DECODER, **_HEADS, **_TOKENS}
_ENCODER = {"hidden_size": 20, "intermediate_size": 27, "num_hidden_layers": 2, "num_attention_heads": 5}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _BIG),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**_BIG, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _BIG),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _BIG),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_BIG, "head_dim": 6}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_BIG, "head_dim": 6}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_BIG, "head_dim": 6, "sliding_window_pattern": 2}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _BIG),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _BIG),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 53, "n_positions": 9, "n_embd": 20, "n_layer": 2, "n_head": 5, **_TOKENS},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"vocab_size": 53, **_ENCODER, **_TOKENS}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 53, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5, "ffn_dim": 27,
            "word_embed_proj_dim": 20, "max_position_embeddings": 9, **_TOKENS,
        },
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {"vocab_size": 53, "max_position_embeddings": 9, **_ENCODER}),
    "vit": ("ViTForImageClassification", "ViTConfig", {"image_size": 8, "patch_size": 4, **_ENCODER}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 53, "d_model": 20, "d_kv": 4, "d_ff": 27, "num_layers": 2, "num_heads": 5},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_BIG, "num_local_experts": 5}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_BIG, "num_experts": 11, "num_experts_per_tok": 2, "moe_intermediate_size": 7, "head_dim": 6},
    ),
}  # fmt: skip


def maker(name: str) -> Callable[[], Any]:
    """What makes a model, on the device that is the default then."""
    import transformers as hf  # here: it costs seconds, and a process that collects the tests runs few of them

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    kind, config, settings = MODELS[name]
    return partial(getattr(hf, kind), getattr(hf, config)(**settings))


def plain(name: str, seed: int = 0) -> Any:
    """A model on one device whose elements all differ."""
    make = maker(name)
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def on_meta(name: str) -> Any:
    make = maker(name)
    with torch.device("meta"):
        return make().eval()


class Spread(ShardedModule):
    """A module's parameters under their names: one dim of each over the ranks, concatenations part by part."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh, turn: int, known: dict[int, Any]) -> None:
        super().__init__(mesh, ["tp"])
        for key, child in module.named_children():
            self.add_module(key, child)
        for at, (key, whole) in enumerate(module.named_parameters(recurse=False)):
            if id(whole) not in known:
                sharding = spread(tuple(whole.shape), (turn + at) % whole.dim(), mesh, turn)
                if whole.is_meta:
                    local = torch.empty(sharding.local_shape, dtype=whole.dtype, device="meta")
                else:
                    local = sharding.shard(whole)
                known[id(whole)] = nn.Parameter(local, whole.requires_grad), sharding, whole
            parameter, self._shardings[key], _ = known[id(whole)]
            self.register_parameter(key, parameter)


def spread(shape: tuple[int, ...], dim: int, mesh: DeviceMesh, turn: int) -> ParamSharding:
    """One dim over the ranks; every other time as a concatenation of a larger and a smaller part."""
    letters = "abcd"[: len(shape)]
    spec = parse_tensor(f"W[{','.join(letter + '/tp' * (at == dim) for at, letter in enumerate(letters))}]")
    if turn % 2 or shape[dim] < 4:
        return ParamSharding(spec, shape, mesh)
    first = shape[dim] // 2 + 1
    sizes = [(*shape[:dim], size, *shape[dim + 1 :]) for size in (first, shape[dim] - first)]
    return ParamSharding(spec, shape, mesh, parts=tuple(ParamSharding(spec, size, mesh) for size in sizes), dim=dim)


def spread_model(model: Any, mesh: DeviceMesh) -> Any:
    """Replace, in place, every module that has parameters of its own, except for models, what has buffers, and what is
    tied to that."""
    from transformers import PreTrainedModel

    known: dict[int, Any] = {}
    kept = {id(one) for module in model.modules() if module._buffers for one in module.parameters(recurse=False)}
    for turn, (path, module) in enumerate(list(model.named_modules())):
        own = {id(one) for one in module.parameters(recurse=False)}
        if own and not own & kept and not isinstance(module, PreTrainedModel):
            parent, _, key = path.rpartition(".")
            setattr(model.get_submodule(parent), key, Spread(module, mesh, turn, known))
    return model
