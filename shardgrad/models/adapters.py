"""LoRA adapters of peft: sharded as the layers are that they stand beside."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardgrad.errors import LayoutError
from shardgrad.models.features import Features, written
from shardgrad.models.plan import Assigned, Laid


def with_adapters(model: nn.Module, laid: Laid, axis: str) -> Laid:
    """A plan with entries for the adapters of its layers.

    Beside a column parallel layer, A makes the few features r of the replicated input, on every rank, and B shards them
    out as the layer does; beside a row parallel one, A sums them up as the layer does, and B is replicated.

    Raises:
        LayoutError: adapters of a kind that is not known.
    """
    found = list(laid.modules)
    for one in laid.modules:
        if not one.name.endswith(".base_layer"):
            continue
        wrapper: Any = model.get_submodule(one.name.removesuffix(".base_layer"))
        _check(wrapper, one)
        kind = one.features.kind(axis)
        for adapter in wrapper.lora_A:
            if kind == "row":
                text, part = Features.of(f"{written(one.features.into)} -> r", one.pattern), "lora_A"
            elif kind == "column":
                out = " + ".join(written(letters) for letters in one.features.parts)
                text, part = Features.of(f"r -> {out}", one.pattern), "lora_B"
            else:
                continue
            name = f"{one.name.removesuffix('.base_layer')}.{part}.{adapter}"
            found.append(Assigned(name, model.get_submodule(name), text, one.pattern, f"{one.plain}.{part}.{adapter}"))
    return Laid(tuple(found), laid.integers, laid.experts)


def _check(wrapper: Any, one: Assigned) -> None:
    if not hasattr(wrapper, "lora_A"):
        raise LayoutError(
            f"{one.plain} is in a {type(wrapper).__name__}: of adapters, LoRA's on linear layers are known"
        )
    if len(getattr(wrapper, "lora_embedding_A", ())):
        raise LayoutError(f"{one.plain} is an embedding with LoRA: leave it out of target_modules, or of the plan")
    if len(getattr(wrapper, "lora_magnitude_vector", ())):
        raise LayoutError(f"{one.plain} has DoRA's magnitudes, norms of whole rows: use_dora=False")
    if one.features.gathered:
        raise LayoutError(
            f"{one.plain} gathers its output, and an adapter's would not be: leave it out of target_modules"
        )
    if getattr(wrapper, "merged", False):
        raise LayoutError(f"{one.plain} has its adapters merged: unmerge them first (model.unmerge_adapter())")
