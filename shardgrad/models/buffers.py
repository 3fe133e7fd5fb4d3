"""Buffers that no file holds (the frequencies of rotary positions, say), made anew where a model was built on meta."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.models.names import is_pretrained


def rebuild_buffers(model: nn.Module, device: torch.device) -> list[str]:
    """Give every non-persistent buffer on meta its values, as transformers does: by the model's own `_init_weights`.

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
            if one is not None and one.is_meta and key in module._non_persistent_buffers_set
        }
        if not on_meta:
            continue
        owner = _nearest(path, models)
        made = {key: torch.zeros_like(one, device=device) for key, one in on_meta.items()}
        again = {key: torch.ones_like(one, device=device) for key, one in on_meta.items()}
        if owner is not None:
            for values in (again, made):
                module._buffers.update(values)
                _run_init(owner, module, list(values.values()))
        for key, one in on_meta.items():
            if owner is None or not torch.equal(made[key], again[key]):
                module._buffers[key] = one
                left.append(f"{path}.{key}" if path else key)
    return left


def _nearest(path: str, models: dict[str, nn.Module]) -> nn.Module | None:
    """The innermost model of transformers around a module."""
    while path and path not in models:
        path = path.rpartition(".")[0]
    return models.get(path)


@torch.no_grad()
def _run_init(owner: Any, module: nn.Module, buffers: list[Tensor]) -> None:
    """Let a model initialise these buffers of one of its modules, and nothing else of it."""
    from transformers.initialization import guard_torch_init_functions

    given = {id(one) for one in buffers}
    kept = [one for one in (*module.parameters(), *module.buffers()) if id(one) not in given]
    with _marked(kept), guard_torch_init_functions():
        owner._init_weights(module)


@contextmanager
def _marked(tensors: list[Tensor]) -> Iterator[None]:
    """Inside, transformers' functions that initialise leave these tensors as they are."""
    fresh = [one for one in tensors if not hasattr(one, "_is_hf_initialized")]
    for one in fresh:
        one._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for one in fresh:
            del one._is_hf_initialized  # type: ignore[attr-defined]
