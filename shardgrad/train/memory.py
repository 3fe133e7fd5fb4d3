"""Whether a run could fit into memory at all, told before anything is allocated."""

from __future__ import annotations

import torch

from shardgrad.hardware import memory
from shardgrad.layout.units import format_si
from shardgrad.nn.linear_loss import ELEMENTS
from shardgrad.train.config import Config, ConfigError, Model
from shardgrad.train.data import BYTES
from shardgrad.train.foreign import describe
from shardgrad.train.llama import hidden_features
from shardgrad.train.model import MLP_RATIO

_STATE = 16  # bytes of a parameter in training: float32 itself, its gradient, AdamW's two moments
_BLOCK = 20_000  # bytes of a block's modules, whatever its sizes
# What a rank holds while a step is compared with one device, as measured on CPU: of itself; of each parameter; of each
# token, for a feature of the residual stream in a block, an attention score, a logit.
_RANK, _PARAMETER, _FEATURE, _SCORE, _LOGIT = 350e6, 150, 500, 60, 120


def parameters(model: Model, vocab: int) -> int:
    """The parameters of a decoder's matrices; vectors are left out."""
    d, llama = model.d_model, model.kind == "llama"
    kv = d * (model.kv_heads or model.heads) // model.heads
    hidden = model.d_ff or (hidden_features(d) if llama else MLP_RATIO * d)
    block = 2 * d * d + 2 * d * kv + (3 if llama else 2) * d * hidden
    tables = vocab * (1 if model.tied else 2) + (0 if llama else model.seq_len)
    return model.layers * block + tables * d


def least_bytes(config: Config, ranks: int) -> int:
    """What the ranks of a decoder's training hold together at the least: parameters, gradients and moments, and of
    one micro-batch each block's input and the logits, or a chunk of them. 0 of a model of transformers, which says its
    sizes itself."""
    model, train, mesh = config.model, config.train, config.mesh
    if not isinstance(model, Model):
        return 0
    vocab = config.data.vocab or BYTES
    copies = 1 if mesh.fully_sharded or mesh.grid is not None else mesh.dp or 1
    rows = train.batch // train.accumulate * model.seq_len
    logits = min(rows * vocab, ranks * ELEMENTS) if train.loss != "sharded" and mesh.grid is None else rows * vocab
    kept = rows * model.layers * model.d_model * (2 if train.dtype == "bfloat16" else 4) + 4 * logits
    ids = 16 * train.batch * model.seq_len // max(train.accumulate, 1)
    return copies * _STATE * parameters(model, vocab) + kept + ids + ranks * model.layers * _BLOCK


def check_memory(config: Config, ranks: int, local_ranks: int) -> None:
    """Refuse a decoder that could not be trained in this machine's memory.

    Args:
        config: its ranks resolved.
        ranks, local_ranks: of the run, and those of them on this machine.

    Raises:
        ConfigError: it needs more, with the numbers and the keys that decide them.
    """
    if config.mesh.device == "cpu":
        here = memory()
    else:
        here = local_ranks * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    needed = least_bytes(config, ranks) * local_ranks // ranks
    if needed <= here or not isinstance(config.model, Model):
        return
    model = config.model
    count = format_si(parameters(model, config.data.vocab or BYTES), "").strip()
    raise ConfigError(
        f"the model does not fit into memory: model.layers = {model.layers}, model.d_model = {model.d_model}, "
        f"model.seq_len = {model.seq_len} and train.batch = {config.train.batch} are {count} parameters, and with "
        f"gradients, moments and one micro-batch at least {format_si(needed, 'B')} for the {local_ranks} ranks of this "
        f"machine, which has {format_si(here, 'B')}: make them smaller, or use more machines"
    )


def verification_bytes(config: Config, ranks: int, vocab: int) -> float:
    """What the ranks hold together, about, to compare a step with one device, each with the whole of it in float64.

    Of a model of transformers no more is counted than parameters and logits.
    """
    model, tokens = config.model, config.train.batch * config.model.seq_len
    if isinstance(model, Model):
        count = parameters(model, vocab)
        scores = model.heads * model.seq_len * _SCORE
        token = model.layers * (model.d_model * _FEATURE + scores) + vocab * _LOGIT
    else:
        about = describe(model)
        count = sum(parameter.numel() for parameter in about.make("meta").parameters())
        token = int(about.config.get_text_config().vocab_size) * _LOGIT
    return ranks * (_RANK + count * _PARAMETER + tokens * token)


def check_verification(config: Config, ranks: int, vocab: int) -> None:
    """Refuse a step that could not be compared with one device in this machine's memory.

    Raises:
        ConfigError: it needs more, with the numbers and the keys that decide them.
    """
    needed, here = verification_bytes(config, ranks, vocab), memory()
    if needed <= here:
        return
    model, batch = config.model, config.train.batch
    sizes = {"train.batch": (batch, min(batch, 2 * config.train.accumulate)), "model.seq_len": (model.seq_len, 16)}
    if isinstance(model, Model):
        small = 8 * model.heads
        sizes |= {"model.layers": (model.layers, 1), "model.d_model": (model.d_model, small)}
        sizes |= {"model.d_ff": (model.d_ff, 3 * small)} if model.d_ff is not None else {}
    said = ", ".join(f"{key} = {size:,}" for key, (size, _) in sizes.items())
    raise ConfigError(
        f"with {said} and a vocabulary of {vocab:,} it takes about {format_si(needed, 'B')} to verify a step "
        f"on {ranks} ranks, each of which also computes the whole of it on one device, in float64; this machine has "
        f"{format_si(here, 'B')}. Verify the same code at a smaller size, such as "
        f"{' '.join(f'{key}={small}' for key, (_, small) in sizes.items())}"
    )
