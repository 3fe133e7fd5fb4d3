"""From a configuration to what it names: the mesh's part in a model, the model, and the same on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.balanced import set_balanced
from shardgrad.comm.mesh import view
from shardgrad.layout.batch_axis import BatchAxis
from shardgrad.train.causal_lm import OneDevice, build_causal_lm
from shardgrad.train.config import Config, Model, decoder_sizes
from shardgrad.train.decoder import Decoder
from shardgrad.train.grid import AXES, Grid
from shardgrad.train.language_model import LanguageModel
from shardgrad.train.llama import Llama, hidden_features
from shardgrad.train.model import GPT, MLP_RATIO
from shardgrad.train.reference import Reference, name_here

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def mesh_shape(config: Config) -> dict[str, int]:
    """The axes of the mesh, major first, of a configuration whose ranks are resolved."""
    if config.mesh.grid is not None:
        return dict(zip(AXES, config.mesh.grid))
    assert config.mesh.dp is not None
    assert config.mesh.tp is not None
    return {"dp": config.mesh.dp, "tp": config.mesh.tp}


def batch_axis(config: Config, ranks: int) -> BatchAxis | None:
    """How layers take part in data parallelism over so many ranks.

    With micro-batches, what is replicated over dp is left partial (`{dp}`) and summed after the last of them; with one
    batch, each layer's backward sums it, under the products of the layers before. A model of transformers sums it in
    every backward, of each micro-batch; so does exact mode, where one rank may have several pieces of the batch.
    """
    exact = config.train.exact is not None
    if ranks == 1 and not exact:
        return None
    accumulate = config.train.accumulate > 1 and isinstance(config.model, Model) and not exact
    return BatchAxis("dp", shard_params=config.mesh.fully_sharded, accumulate=accumulate)


def build_model(config: Config, vocab: int, mesh: DeviceMesh) -> LanguageModel:
    """The sharded model on a mesh of `mesh_shape`; values by torch.manual_seed, or by a folder.

    Raises:
        ConfigError, LayoutError, ValueError, OSError: as `build_causal_lm`.
    """
    if isinstance(config.model, Model):
        made = build(config, vocab, mesh)
        made.fused_loss = None if config.train.loss is None else config.train.loss == "fused"
        return made
    _balance(config, mesh)
    return build_causal_lm(config, vocab, mesh, batch_axis(config, view(mesh).shape["dp"]), **_dtypes(config))


def _balance(config: Config, mesh: DeviceMesh) -> None:
    if config.mesh.balanced:
        set_balanced(mesh)


def _dtypes(config: Config) -> dict[str, torch.dtype | None]:
    compute, reduce = _DTYPES[config.train.dtype], config.train.reduce_dtype
    return {
        "compute_dtype": None if compute == torch.float32 else compute,
        "reduce_dtype": None if reduce is None else _DTYPES[reduce],
    }


def build(config: Config, vocab: int, mesh: DeviceMesh) -> Decoder:
    """The built-in decoder on a mesh of `mesh_shape`; values by torch.manual_seed.

    Raises:
        ConfigError: as `decoder_sizes`.
    """
    model = decoder_sizes(config)
    _balance(config, mesh)
    settings: dict[str, Any] = model.model_dump(exclude={"kind"})
    more: dict[str, Any] = {
        "vocab": vocab,
        "mesh": mesh,
        "data": batch_axis(config, view(mesh).shape.get("dp", 1)),
        **_dtypes(config),
        "recompute": config.train.recompute,
    }
    if config.mesh.grid is not None:
        for key in ("kv_heads", "tied"):
            settings.pop(key)
        more.pop("data")
        return Grid(**settings, **more)
    more["sequence_parallel"] = config.mesh.sequence_parallel
    if model.kind == "llama":
        return Llama(**settings, **more)
    settings.pop("rope_theta")
    return GPT(**settings, **more)


def build_reference(model: Model, vocab: int) -> Reference:
    """The same model on one device, in plain torch, with any values; without dropout."""
    settings: dict[str, Any] = model.model_dump(exclude={"dropout"})
    if settings["d_ff"] is None:
        gpt = model.kind == "gpt"
        settings["d_ff"] = MLP_RATIO * model.d_model if gpt else hidden_features(model.d_model)
    return Reference(**settings, vocab=vocab)


def build_one_device(config: Config, vocab: int) -> Reference | OneDevice:
    """The configured model on one device, with any values; whose names of parameters `one_device_name` gives."""
    return build_reference(config.model, vocab) if isinstance(config.model, Model) else OneDevice(config.model)


def one_device_name(config: Config) -> Callable[[str], str] | None:
    """A parameter's name on one device, from that on a mesh; None where they are the same."""
    return name_here if isinstance(config.model, Model) else None
