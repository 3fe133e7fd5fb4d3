"""A draft of a plan for a model of which none is known: to be edited, with what it guesses marked."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from shardgrad.models.architectures import head_sizes
from shardgrad.models.plan import is_conv1d

_COLUMN = "q k v query key value q_proj k_proj v_proj query_key_value qkv qkv_proj c_attn wq wk wv in_proj Wqkv"
_COLUMN += " gate_proj up_proj gate_up_proj fc1 fc_in c_fc wi wi_0 wi_1 w1 w3 dense_h_to_4h up gate lin1 linear1"
_ROW = "o o_proj out_proj c_proj dense wo down_proj fc2 fc_out w2 dense_4h_to_h down lin2 linear2 proj"


def draft(model: nn.Module, axis: str) -> str:
    """Entries for all linear layers and embeddings of a model, by patterns, with their shapes; and integers of modules
    around them that may count heads."""
    sizes = head_sizes(getattr(model, "config", None))
    found: dict[str, tuple[str, str]] = {}
    parents: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if weight is None or pattern in found or not (linear or isinstance(module, nn.Embedding)):
            continue
        own = name.rpartition(".")[2]
        text, note = _guess(own, module, axis, linear), ""
        if linear and text.endswith(",k"):
            text, note = _fused(text, max(weight.shape), sizes, axis)
            parents.setdefault(pattern.rpartition(".")[0], model.get_submodule(name.rpartition(".")[0]))
        found[pattern] = text, f"{type(module).__name__} {'×'.join(map(str, weight.shape))}{note}"
    return "\n".join(_lines(found, sizes, parents, axis))


def _lines(
    found: dict[str, tuple[str, str]], sizes: dict[str, int], parents: dict[str, nn.Module], axis: str
) -> Iterable[str]:
    yield "{"
    if sizes:
        yield f"    # with sizes={sizes}"
    for pattern, (text, about) in found.items():
        yield f"    {pattern!r}: {text!r},  # {about}" if text else f"    # {pattern!r}: replicated?  {about}"
    counts = {sizes["h"]: f"h/{axis}", sizes["h"] * sizes["k"]: f"h/{axis},k"} if sizes else {}
    for pattern, module in parents.items():
        for name, value in vars(module).items():
            if type(value) is int and value in counts:
                yield f"    # {f'{pattern}.{name}'!r}: {counts[value]!r},  if its forward reads {name}={value}"
    yield "}"


def _fused(text: str, features: int, sizes: dict[str, int], axis: str) -> tuple[str, str]:
    """Of a weight that holds queries, keys and values, a guess and the other order that it may have."""
    if not sizes or text != f"d -> h/{axis},k":
        return text, ""
    h, g, k = sizes["h"], sizes["g"], sizes["k"]
    if features == 3 * h * k:
        return f"d -> c,h/{axis},k", f", or 'd -> h/{axis},c,k': as its forward splits it"
    if features == (h + 2 * g) * k:
        return f"d -> h/{axis},k + g/{axis},k + g/{axis},k", ", if its forward splits it so"
    return (f"d -> g/{axis},k", "") if features == g * k != h * k else (text, "")


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
