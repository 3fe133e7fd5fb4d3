"""The plans of architectures that transformers has, by the `model_type` of their configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Texts = Mapping[str, str]


@dataclass(frozen=True)
class Architecture:
    """A plan with the sizes of its letters; entries that a model lacks (a head, a gate) do not count.

    sequence: how its activations are sharded along the sequence; or why they cannot be.
    """

    plan: Texts
    sizes: Mapping[str, int]
    sequence: Texts | str = field(default_factory=dict)

    def on(self, axis: str) -> Architecture:
        """The same over an axis of another name than tp."""
        plan = {pattern: text.replace("/tp", f"/{axis}") for pattern, text in self.plan.items()}
        if isinstance(self.sequence, str):
            return Architecture(plan, self.sizes, self.sequence)
        return Architecture(plan, self.sizes, {name: text.replace("tp", axis) for name, text in self.sequence.items()})


_ATTENTION = {"q_proj": "d -> h/tp,k", "k_proj": "d -> g/tp,k", "v_proj": "d -> g/tp,k", "o_proj": "h/tp,k -> d"}
_GATED = {"gate_proj": "d -> f/tp", "up_proj": "d -> f/tp", "down_proj": "f/tp -> d"}
_VOCABULARY = {"**.embed_tokens": "v/tp -> d", "**.lm_head": "d -> v/tp"}


def _at(prefix: str, texts: Texts) -> dict[str, str]:
    return {f"{prefix}.{name}": text for name, text in texts.items()}


def _stream(layers: str, entered: list[str], last: str) -> dict[str, str]:
    """A stream from the first of some layers to the norm after them, gathered at modules that shard features."""
    starts = {f"**.{layers}.0": "s -> s/tp"}
    return starts | {f"**.{layers}.*.{name}": "s/tp -> s{tp}" for name in entered} | {f"**.{last}": "s/tp -> s"}


def head_sizes(config: Any) -> dict[str, int]:
    """The letters of heads, h, g and k, as a configuration of transformers has them; none of any other."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not hasattr(config, "hidden_size"):
        return {}
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {"h": heads, "g": getattr(config, "num_key_value_heads", None) or heads, "k": width}


def _llama(config: Any) -> Architecture:
    plan = _at("**.layers.*.self_attn", _ATTENTION) | _at("**.layers.*.mlp", _GATED) | _VOCABULARY
    return Architecture(plan, head_sizes(config), _stream("layers", ["self_attn", "mlp"], "norm"))


def _olmo2(config: Any) -> Architecture:
    """Its norms of queries and keys run over all heads."""
    known = _llama(config)
    norms = _at("**.layers.*.self_attn", {"q_norm": "h/tp,k", "k_norm": "g/tp,k"})
    return Architecture({**known.plan, **norms}, known.sizes, known.sequence)


def _phi3(config: Any) -> Architecture:
    plan = {
        "**.layers.*.self_attn.qkv_proj": "d -> h/tp,k + g/tp,k + g/tp,k",
        "**.layers.*.self_attn.o_proj": "h/tp,k -> d",
        "**.layers.*.self_attn.num_key_value_heads": "g/tp",
        "**.layers.*.self_attn.config.num_attention_heads": "h/tp",
        "**.layers.*.mlp.gate_up_proj": "d -> c,f/tp",
        "**.layers.*.mlp.down_proj": "f/tp -> d",
        **_VOCABULARY,
    }
    return Architecture(plan, {**head_sizes(config), "c": 2}, _stream("layers", ["self_attn", "mlp"], "norm"))


def _mixture(config: Any) -> Architecture:
    """Of experts, each sharded; layers without a mixture have a plain one."""
    known = _llama(config)
    experts = _at("**.layers.*.mlp.experts", {"gate_up_proj": "d -> c,f/tp", "down_proj": "f/tp -> d"})
    assert not isinstance(known.sequence, str)
    sequence = dict(known.sequence)
    plain = sequence.pop("**.layers.*.mlp")
    for at in range(config.num_hidden_layers):
        sequence[f"**.layers.{at}.mlp"] = "s/tp -> s{tp} -> s/tp" if _is_mixture(config, at) else plain
    return Architecture({**known.plan, **experts}, {**known.sizes, "c": 2}, sequence)


def _is_mixture(config: Any, layer: int) -> bool:
    others = getattr(config, "mlp_only_layers", None) or ()
    return layer not in others and (layer + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0


def _gpt2(config: Any) -> Architecture:
    plan = {
        "**.h.*.attn.c_attn": "d -> c,h/tp,k",
        "**.h.*.attn.c_proj": "h/tp,k -> d",
        "**.h.*.attn.split_size": "h/tp,k",
        "**.h.*.mlp.c_fc": "d -> f/tp",
        "**.h.*.mlp.c_proj": "f/tp -> d",
        "**.wte": "v/tp -> d",
        "**.lm_head": "d -> v/tp",
    }
    return Architecture(plan, {**head_sizes(config), "c": 3}, _stream("h", ["attn", "mlp"], "ln_f"))


def _gpt_neox(config: Any) -> Architecture:
    plan = {
        "**.layers.*.attention.query_key_value": "d -> h/tp,c,k",
        "**.layers.*.attention.dense": "h/tp,k -> d",
        "**.layers.*.mlp.dense_h_to_4h": "d -> f/tp",
        "**.layers.*.mlp.dense_4h_to_h": "f/tp -> d",
        "**.embed_in": "v/tp -> d",
        "**.lm_head": "d -> v/tp",
    }
    sequence = _stream("layers", ["attention", "mlp"], "final_layer_norm")
    return Architecture(plan, {**head_sizes(config), "c": 3}, sequence)


def _opt(config: Any) -> Architecture:
    heads = {f"{name}_proj": "d -> h/tp,k" for name in "qkv"}
    plan = _at("**.layers.*.self_attn", {**heads, "out_proj": "h/tp,k -> d", "num_heads": "h/tp"})
    plan |= {"**.layers.*.fc1": "d -> f/tp", "**.layers.*.fc2": "f/tp -> d", **_VOCABULARY}
    why = "OPT's layers merge batch and sequence into one dim between attention and feed-forward"
    return Architecture(plan, head_sizes(config), why)


def _bert(config: Any) -> Architecture:
    plan = {
        **{f"**.layer.*.attention.self.{name}": "d -> h/tp,k" for name in ("query", "key", "value")},
        **{f"**.layer.*.crossattention.self.{name}": "d -> h/tp,k" for name in ("query", "key", "value")},
        "**.layer.*.attention.output.dense": "h/tp,k -> d",
        "**.layer.*.crossattention.output.dense": "h/tp,k -> d",
        "**.layer.*.intermediate.dense": "d -> f/tp",
        "**.layer.*.output.dense": "f/tp -> d",
        "**.embeddings.word_embeddings": "v/tp -> d",
        "**.cls.predictions.decoder": "d -> v/tp",
    }
    sequence = {
        "**.encoder": "s -> s/tp -> s",
        "**.encoder.layer.*.attention.self": "s/tp -> s{tp}",
        "**.encoder.layer.*.intermediate": "s/tp -> s{tp}",
    }
    return Architecture(plan, head_sizes(config), sequence)


def _vit(config: Any) -> Architecture:
    heads = {f"{name}_proj": "d -> h/tp,k" for name in "qkv"}
    plan = _at("**.layers.*.attention", {**heads, "o_proj": "h/tp,k -> d"})
    plan |= _at("**.layers.*.mlp", {"fc1": "d -> f/tp", "fc2": "f/tp -> d"})
    return Architecture(plan, head_sizes(config), _stream("layers", ["attention", "mlp"], "layernorm"))


def _t5(config: Any) -> Architecture:
    plan: dict[str, str] = {}
    sequence: dict[str, str] = {}
    for name in ("SelfAttention", "EncDecAttention"):
        plan |= _at(f"**.block.*.layer.*.{name}", {**dict.fromkeys("qkv", "d -> h/tp,k"), "o": "h/tp,k -> d"})
        plan[f"**.block.*.layer.*.{name}.n_heads"] = "h/tp"
    plan["**.block.*.layer.*.SelfAttention.relative_attention_bias"] = "b -> h/tp"
    feed = {**dict.fromkeys(("wi", "wi_0", "wi_1"), "d -> f/tp"), "wo": "f/tp -> d"}
    plan |= _at("**.block.*.layer.*.DenseReluDense", feed)
    plan |= {"**.shared": "v/tp -> d", **_VOCABULARY}
    for stack in ("encoder", "decoder"):
        inside = [f"layer.*.{name}" for name in ("SelfAttention", "EncDecAttention", "DenseReluDense")]
        sequence |= _stream(f"{stack}.block", inside, f"{stack}.final_layer_norm")
    return Architecture(plan, {"h": config.num_heads, "g": config.num_heads, "k": config.d_kv}, sequence)


KNOWN: dict[str, Callable[[Any], Architecture]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), _llama),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _mixture),
    "olmo2": _olmo2,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bert": _bert,
    "vit": _vit,
    "t5": _t5,
}


def architecture_of(model: Any, axis: str = "tp") -> Architecture | None:
    """What is known of a model's architecture, over an axis; None if nothing is."""
    config = getattr(model, "config", None)
    known = KNOWN.get(getattr(config, "model_type", ""))
    return None if known is None else known(config).on(axis)
