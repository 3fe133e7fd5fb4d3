"""Buffers that no file holds (the frequencies of rotary positions, say), made anew where a model was built on meta."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.comm import shim
from shardgrad.models.names import is_pretrained


def rebuild_buffers(model: nn.Module, device: torch.device) -> list[str]:
    """Give every non-persistent buffer on meta its values: by its module's own `reset_buffers()`, where it has that, or
    as transformers does, by the model's `_init_weights`.

    Each is computed twice, from two different starts: what the model does not write differs.

    Returns:
        The names of those that the model does not write. They stay on meta.
    """
    left: list[str] = []
    models = {path: module for path, module in model.named_modules() if is_pretrained(module)}
    for path, module in model.named_modules():
        on_meta = {
            key: one
            for key, one in module._buffers.items()
            if one is not None and one.is_meta and not shim.is_persistent(module, key)
        }
        if not on_meta:
            continue
        compute = _initialiser(path, module, models)
        made = {key: torch.zeros_like(one, device=device) for key, one in on_meta.items()}
        again = {key: torch.ones_like(one, device=device) for key, one in on_meta.items()}
        if compute is not None:
            for values in (again, made):
                module._buffers.update(values)
                with _only(module, list(values.values())):
                    compute()
        for key, one in on_meta.items():
            if compute is None or not torch.equal(made[key], again[key]):
                module._buffers[key] = one
                left.append(f"{path}.{key}" if path else key)
    return left


def _initialiser(path: str, module: Any, models: Mapping[str, Any]) -> Callable[[], object] | None:
    """What computes the buffers of a module: its own method, or that of the model of transformers around it."""
    if hasattr(module, "reset_buffers"):
        return module.reset_buffers
    while path and path not in models:
        path = path.rpartition(".")[0]
    owner = models.get(path)
    if owner is None:
        return None

    def compute() -> None:
        from transformers.initialization import guard_torch_init_functions

        with guard_torch_init_functions():
            owner._init_weights(module)

    return compute


@contextmanager
def _only(module: nn.Module, buffers: list[Tensor]) -> Iterator[None]:
    """Inside, transformers' functions that initialise leave all of a module as it is, but for these buffers."""
    given = {id(one) for one in buffers}
    kept = [one for one in (*module.parameters(), *module.buffers()) if id(one) not in given]
    fresh = [one for one in kept if not hasattr(one, "_is_hf_initialized")]
    for one in fresh:
        one._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            yield
    finally:
        for one in fresh:
            del one._is_hf_initialized  # type: ignore[attr-defined]
