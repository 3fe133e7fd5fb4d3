"""A draft of a plan for a model of which none is known: to be edited, with what it guesses marked."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_COLUMN = "q k v query key value q_proj k_proj v_proj query_key_value qkv qkv_proj c_attn wq wk wv in_proj Wqkv"
_COLUMN += " gate_proj up_proj gate_up_proj fc1 fc_in c_fc wi wi_0 wi_1 w1 w3 dense_h_to_4h up gate lin1 linear1"
_ROW = "o o_proj out_proj c_proj dense wo down_proj fc2 fc_out w2 dense_4h_to_h down lin2 linear2 proj"


def draft(model: nn.Module, axis: str) -> str:
    """Entries for all linear layers and embeddings of a model, by patterns, with their shapes."""
    found: dict[str, tuple[str, str]] = {}
    for name, module in model.named_modules():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if weight is None or pattern in found or not (linear or isinstance(module, nn.Embedding)):
            continue
        shape = "×".join(map(str, weight.shape))
        found[pattern] = _guess(name.rpartition(".")[2], module, axis, linear), f"{type(module).__name__} {shape}"
    return "\n".join(_lines(found))


def _lines(found: dict[str, tuple[str, str]]) -> Iterable[str]:
    yield "{"
    for pattern, (text, about) in found.items():
        yield f"    {pattern!r}: {text!r},  # {about}" if text else f"    # {pattern!r}: replicated?  {about}"
    yield "}"


def _guess(name: str, module: nn.Module, axis: str, linear: bool) -> str:
    if not linear:
        large = isinstance(module, nn.Embedding) and module.num_embeddings > module.embedding_dim
        return f"v/{axis} -> d" if large and not re.search("pos|type", name) else ""
    if name in ("lm_head", "embed_out"):
        return f"d -> v/{axis}"
    if name in _COLUMN.split():
        heads = name.startswith(("q", "k", "v", "wq", "wk", "wv", "Wqkv", "c_attn", "in_proj"))
        return f"d -> h/{axis},k" if heads else f"d -> f/{axis}"
    if name in _ROW.split():
        return f"h/{axis},k -> d" if name in ("o", "o_proj", "out_proj", "dense") else f"f/{axis} -> d"
    return ""
