"""Tiny models of transformers, all their parameters random, beside themselves on one device, in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

import shardgrad as sg

V, F, S = 53, 29, 7  # vocabulary, hidden features and sequence: none of them divides by 2, 3 or 4
_DECODER = {"vocab_size": V, "intermediate_size": F, "num_hidden_layers": 2, "head_dim": 4}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 16}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Heads = tuple[int, int]


def _grouped(heads: Heads) -> dict[str, Any]:
    number = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return {**_DECODER, **_TOKENS, **number, "hidden_size": 30 // heads[0] * heads[0]}


def _mha(heads: Heads) -> dict[str, Any]:
    width = {"hidden_size": 6 * heads[0], "num_attention_heads": heads[0]}
    return {**_TOKENS, "vocab_size": V, "num_hidden_layers": 2, **width}


def _encoder(heads: Heads) -> dict[str, Any]:
    width = {"hidden_size": 6 * heads[0], "num_attention_heads": heads[0]}
    return {"num_hidden_layers": 2, "intermediate_size": F, **width, **_NO_DROPOUT}


def _moe(heads: Heads) -> dict[str, Any]:
    return {**_grouped(heads), "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 11}


_T5 = {"vocab_size": V, "d_model": 26, "d_kv": 6, "d_ff": F, "num_layers": 2, "dropout_rate": 0.0}
_GPT2_DROPOUT = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}

MODELS: dict[str, tuple[str, str, Callable[[Heads], dict[str, Any]]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", lambda h: {**_grouped(h), "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", lambda h: {**_grouped(h), "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _grouped),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _grouped),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", lambda h: {**_grouped(h), "sliding_window": 4}),
    "gemma3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        lambda h: {**_grouped(h), "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (
        "Phi3Config", "Phi3ForCausalLM", lambda h: {**_grouped(h), "original_max_position_embeddings": 16},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _grouped),
    "mixtral": (
        "MixtralConfig", "MixtralForCausalLM",
        lambda h: {**_grouped(h), "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", lambda h: {**_moe(h), "mlp_only_layers": [1]}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", lambda h: {**_mha(h), "n_inner": F, **_GPT2_DROPOUT}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", lambda h: {**_mha(h), "intermediate_size": F}),
    "opt": (
        "OPTConfig", "OPTForCausalLM",
        lambda h: {**_mha(h), "ffn_dim": F, "word_embed_proj_dim": 6 * h[0], "dropout": 0.0},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", lambda h: {**_encoder(h), "vocab_size": V}),
    "bert alone": ("BertConfig", "BertModel", lambda h: {**_encoder(h), "vocab_size": V}),
    "vit": ("ViTConfig", "ViTForImageClassification", lambda h: {**_encoder(h), "image_size": 6, "patch_size": 3}),
    "t5": (
        "T5Config", "T5ForConditionalGeneration",
        lambda h: {**_T5, "num_heads": h[0], "decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    "falcon": (
        "FalconConfig", "FalconForCausalLM",
        lambda h: {**_mha(h), "multi_query": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "bias": True},
    ),
}  # fmt: skip

GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "mixtral", "qwen3_moe")
KNOWN = tuple(name for name in MODELS if name != "falcon")


def line(world_size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))


def plain(
    name: str, heads: Heads = (6, 3), attention: str = "sdpa", dtype: torch.dtype = torch.float64, **changes: Any
) -> Any:
    """A model on one device, alike on every rank: no two parameters have the same values, no norm is 1, no bias 0."""
    import transformers as hf  # here: it costs seconds, and a process that collects the tests runs few of them

    hf.utils.logging.set_verbosity_error()
    config, kind, sizes = MODELS[name]
    attention = "eager" if name == "gemma2" else attention  # it has no other
    model = getattr(hf, kind)(getattr(hf, config)(attn_implementation=attention, **{**sizes(heads), **changes}))
    if name in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")  # the grouped product takes neither float64 nor sizes so uneven
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() < 2 else 0.25 * noise)
    return model.to(dtype).train()


def batch(name: str, rows: int = 2, length: int = S) -> dict[str, Tensor]:
    """What a model is called with: the last token of the vocabulary is in it, and some tokens are masked."""
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        pixels = torch.randn(rows, 3, 6, 6, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels, "labels": torch.arange(rows) % 2}
    ids = torch.randint(3, V, (rows, length), generator=generator)
    ids[0, 0] = V - 1
    mask = torch.ones_like(ids)
    mask[1:, length - length // 4 :] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "bert alone":
        return given
    return {
        **given,
        "labels": ids[:, : max(length - 2, 1)].contiguous() if name == "t5" else ids.masked_fill(mask == 0, -100),
    }


class Float64(TorchFunctionMode):
    """What a model's program does in float32 whatever its dtype is, done in float64: norms, softmax, rotary angles."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


def loss_of(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """A model's own loss; of one without a head, a sum of what it gives with random factors."""
    out = model(**given)
    if "labels" in given:
        return out.loss
    generator = torch.Generator().manual_seed(6)
    made = [out.last_hidden_state, out.pooler_output]
    return sum((one * torch.randn(one.shape, generator=generator)).sum() for one in made) / 10  # type: ignore[return-value]


def backward(model: Any, given: Mapping[str, Tensor], exact: bool = True) -> Tensor:
    """One forward and backward of a model whose gradients are None before; its loss.

    exact: in float64 throughout; what backward computes again is not, as modes are off in it.
    """
    model.zero_grad()
    with Float64() if exact else nullcontext():
        loss = loss_of(model, given)
        loss.backward()
    return loss.detach()


def whole(tensor: Tensor, sharding: sg.ParamSharding | None) -> Tensor:
    """A parameter, or its gradient, as one device holds it."""
    part = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return part if sharding is None else sharding.unshard(part)


def assert_same_gradients(model: nn.Module, one: nn.Module, rtol: float = 1e-10) -> None:
    """Every gradient of a parallelized model, whole, is one device's, and missing where that one's is (NaN fails).

    The bound of each is in its own norm, and a thousandth of `rtol` in that of all: a gradient may be zero in exact
    arithmetic (of keys' biases, which softmax does not see).
    """
    expected = {plainly(name): parameter.grad for name, parameter in one.named_parameters()}
    every = float(torch.stack([grad.norm() for grad in expected.values() if grad is not None]).norm())
    seen = set()
    for name, parameter, sharding in sg.named_shardings(model):
        right = expected[plainly(name)]
        seen.add(plainly(name))
        assert (parameter.grad is None) == (right is None), name
        if parameter.grad is None or right is None:
            continue
        assert parameter.grad.shape == parameter.shape, name
        found = whole(parameter.grad, sharding)
        assert found.shape == right.shape, name
        error, bound = float((found - right).norm()), rtol * (float(right.norm()) + 1e-3 * every)
        assert error <= bound, f"{name}: off by {error:.1e} of {float(right.norm()):.1e}, bound {bound:.1e}"
    assert seen == set(expected)


def plainly(name: str) -> str:
    """A parameter's name without what wrappers add."""
    return name.removeprefix("module.").replace("_orig_mod.", "")


def assert_calls_agree(model: Any, one: Any, given: Mapping[str, Tensor], calls: int = 2, exact: bool = True) -> None:
    """Loss and gradients of successive calls: the first is watched, the second is not. To float32's rounding, if the
    norms are in float32."""
    rtol = 1e-10 if exact else 1e-5
    for _ in range(calls):
        right, found = backward(one, given, exact), backward(model, given, exact)
        assert abs(found - right) <= 0.01 * rtol * abs(right), f"loss {found}, not {right}"
        assert_same_gradients(model, one, rtol)
