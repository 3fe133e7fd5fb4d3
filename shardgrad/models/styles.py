"""Plans in the names that transformers has for styles of layers, taken where they can mean one thing only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from shardgrad.errors import LayoutError
from shardgrad.models.architectures import head_sizes
from shardgrad.models.plan import matches

_OTHERWISE = {
    "replicated_with_grad_allreduce": "derived: which gradients are sums is watched",
    "moe_tp_experts": "its two weights have entries",
    "replicate": "what has no entry is replicated",
}
_STYLES = {
    "colwise",
    "rowwise",
    "packed_colwise",
    "packed_rowwise",
    "colwise_gather_output",
    "colwise_rep",
    *_OTHERWISE,
}
_STYLES |= {"embedding_rowwise", "rowwise_split_input", "sequence_parallel", "rowwise_rep", "local_colwise", "gather"}


def from_styles(plan: Mapping[str, str], base: Any, axis: str) -> tuple[dict[str, str], dict[str, int]]:
    """A plan with texts in place of styles, and the sizes of letters that its model's configuration gives.

    Patterns beside styles are those of a base model, as `config.base_model_tp_plan` has them: also without its prefix.

    Raises:
        LayoutError: a style that could mean several things here, or has no meaning.
    """
    styled = {
        pattern: text for pattern, text in plan.items() if (isinstance(text, str) and "_" in text) or text in _STYLES
    }
    if not styled:
        return dict(plan), {}
    sizes = head_sizes(getattr(base, "config", None))
    sizes |= {"c": 2} if sizes else {}
    made: dict[str, str] = {}
    for pattern, text in plan.items():
        if pattern not in styled:
            made[pattern] = text
            continue
        if text in _OTHERWISE:
            continue
        wide = pattern if pattern.startswith("**") else f"**.{pattern}"
        found = _text(wide, text, base, sizes, axis)
        if found:
            made[wide] = found
    return made, sizes


def _text(pattern: str, style: str, base: nn.Module, sizes: Mapping[str, int], axis: str) -> str:
    """What a style means for the modules of a pattern; empty where there are none."""
    texts = set()
    for name, module in base.named_modules():
        for own, parameter in (("", getattr(module, "weight", None)), *module._parameters.items()):
            if parameter is not None and matches(pattern, f"{name}.{own}" if own else name):
                texts.add(_meaning(f"{name}.{own}" if own else name, style, module, parameter.shape, sizes, axis))
    if len(texts) > 1:
        raise LayoutError(f"{pattern!r}: {style!r} means {' or '.join(map(repr, sorted(texts)))}: write one of them")
    return texts.pop() if texts else ""


def _meaning(name: str, style: str, module: nn.Module, shape: Any, sizes: Mapping[str, int], axis: str) -> str:
    if isinstance(module, nn.Embedding) and style in ("rowwise", "embedding_rowwise"):
        return f"v/{axis} -> d"
    last = name.rpartition(".")[2]
    attends = any(word in name.lower() for word in ("attn", "attention"))
    known = [x for x in ("h", "g") if x in sizes]

    def features(size: int) -> str:
        if attends:
            for letter in known:
                if sizes[letter] * sizes["k"] == size:
                    return f"{letter}/{axis},k"
            raise LayoutError(
                f"{name}: {style!r} of {size} features, which are not h={sizes.get('h')} or g={sizes.get('g')} heads "
                f"of k={sizes.get('k')}: write how they are stored, as 'd -> h/{axis},k'"
            )
        return f"f/{axis}"

    if style == "colwise":
        return f"d -> v/{axis}" if last == "lm_head" else f"d -> {features(shape[-2])}"
    if style == "rowwise":
        return f"{features(shape[-1])} -> d"
    if style in ("colwise_gather_output", "colwise_rep") and last == "lm_head":
        return f"d -> v/{axis}"
    if style == "packed_colwise" and not attends:
        return f"d -> c,f/{axis}"
    raise LayoutError(
        f"{name}: {style!r} does not say how its features are stored: write it as a text, such as 'd -> c,f/{axis}' or "
        f"'d -> h/{axis},k + g/{axis},k + g/{axis},k'"
    )
