"""What `shardgrad verify` holds against one device: a whole step of the run that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.mesh import view
from shardgrad.nn.partial_grads import all_reduce_partial_grads_
from shardgrad.nn.pieces import is_exact
from shardgrad.ops.exact import set_exact
from shardgrad.train import tokenizer
from shardgrad.train.build import build_model, build_one_device, one_device_name
from shardgrad.train.causal_lm import OneDevice
from shardgrad.train.config import Config, ConfigError, Model, Train, TransformersModel, pieces
from shardgrad.train.data import BYTES
from shardgrad.train.decoder import Decoder
from shardgrad.train.foreign import check_vocab, with_tokenizer
from shardgrad.train.language_model import LanguageModel
from shardgrad.train.memory import check_verification
from shardgrad.train.optimizer import adamw, make_optimizer
from shardgrad.train.reference import Reference
from shardgrad.train.step import losses, micro_batches
from shardgrad.verification.report import Report
from shardgrad.verification.verify import verify

_EPSILON = 1e-8  # AdamW's own


def check(config: Config, ranks: int) -> Config:
    """The configuration as it is verified on so many ranks of this machine: nothing dropped, a model's own tokenizer.

    Raises:
        ConfigError: the model cannot be used, or its step not be compared, or not in this machine's memory.
        DataError: the tokenizer cannot be read.
    """
    if config.train.exact is not None and config.train.accumulate > 1:
        raise ConfigError(
            f"train.exact makes the same bits of train.accumulate = {config.train.accumulate} micro-batches and of "
            "one: verify it with train.accumulate=1"
        )
    section = config.model
    if isinstance(section, TransformersModel) and section.made_by and not Path(section.pretrained or "").exists():
        raise ConfigError(
            f"model.pretrained = {section.pretrained} is not there before model.made_by = {section.made_by} has been "
            "run: train first, or verify that one"
        )
    if isinstance(section, Model):
        config = config.model_copy(update={"model": section.model_copy(update={"dropout": 0.0})})
    if config.mesh.device != "cpu":
        raise ConfigError(f"mesh.device = {config.mesh.device}: a step is verified on the CPU; add mesh.device=cpu")
    config = with_tokenizer(config)
    vocab = vocabulary(config)
    check_vocab(config, vocab)
    check_verification(config, ranks, vocab)
    return config


def vocabulary(config: Config) -> int:
    """How many tokens the run has, found without its text. Of data.tokenizer = bpe, the most that it may find.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    data = config.data
    if data.tokens is not None or data.tokenizer == "bpe":
        assert data.vocab is not None
        return data.vocab
    return BYTES if data.tokenizer in (None, "bytes") else tokenizer.load(data.tokenizer).vocab


def verify_run(config: Config, mesh: DeviceMesh, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Hold one step of the run against one device; called on every rank.

    The step is the run's: its model and values on its mesh, stored and computed as it says, its micro-batches, its
    AdamW. Tokens are random, so that no text is needed. AdamW's epsilon is as large as gradients are: with the run's,
    a first step is the gradients' signs, and of the smallest of them rounding decides the sign.

    Args:
        config: as `check` returns it, its ranks resolved.
        mesh: of `mesh_shape`.
        progress: is told what is done, on every rank.

    Raises:
        ConfigError, LayoutError, ValueError, OSError: as `build_model`.
    """
    settings, seed = config.train, config.run.seed % 2**32
    vocab = vocabulary(config)
    torch.manual_seed(config.run.seed)
    model = build_model(config, vocab, mesh)
    set_exact(mesh, pieces(config))
    torch.manual_seed(config.run.seed)
    single = build_one_device(config, vocab)
    ids, targets = torch.randint(vocab, (2, settings.batch, config.model.seq_len)).unbind()
    progress(_in_words(config, single, vocab, view(mesh).shape))

    def single_loss(one: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        assert isinstance(one, Reference | OneDevice)
        wide = next(one.parameters()).dtype == torch.float64
        parts = zip(ids.chunk(settings.accumulate), targets.chunk(settings.accumulate))
        return torch.stack([one.loss(*part, None if wide else model.compute_dtype) for part in parts]).mean()

    report = verify(
        model,
        single,
        [ids, targets],
        mesh,
        loss=single_loss,
        parallel_loss=lambda model, ids, targets: _loss(model, ids, targets, settings.accumulate),
        splits=_terms(model),
        names=one_device_name(config),
        optimizer=_optimizer(model, single, settings, _size_of_gradients(single, single_loss, ids, targets)),
        complete=all_reduce_partial_grads_,
        seed=seed,
        progress=progress,
    )
    if settings.dtype != "float32":
        report = replace(report, dtype=f"{settings.dtype}, parameters {report.dtype}")
    return report


def _in_words(config: Config, single: nn.Module, vocab: int, mesh: dict[str, int]) -> str:
    count = sum(parameter.numel() for parameter in single.parameters())
    where = ", ".join(f"{axis}={ranks}" for axis, ranks in mesh.items())
    train = config.train
    return (
        f"one step of {count:,} parameters, a vocabulary of {vocab:,}, {train.batch} sequences of "
        f"{config.model.seq_len} in {train.accumulate} micro-batch{'es' if train.accumulate > 1 else ''}, "
        f"{train.dtype}, on the mesh {where}"
    )


def _loss(model: LanguageModel, ids: Tensor, targets: Tensor, accumulate: int) -> Tensor:
    """The mean loss over the whole batch, as `step.backward` adds it up."""
    if is_exact(model.mesh):
        assert isinstance(model, Decoder)
        (mine,) = micro_batches(model, ids, targets, 1)
        return model.loss_sum(*mine, (0, len(ids))) / targets.numel()
    return torch.stack(list(losses(model, ids, targets, accumulate))).sum()


def _terms(model: LanguageModel) -> dict[str, str]:
    """What is a term of a sum by design: each rank of dp adds the positions' rows to sequences of its own."""
    if not isinstance(model, Decoder) or model.positions is None or model.data is None or is_exact(model.mesh):
        return {}
    return {"positions*.grad": f"P[s/{model.axis},d]{{{model.data.axis}}}"}


def _size_of_gradients(
    single: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], ids: Tensor, targets: Tensor
) -> float:
    """The root mean square of a gradient's elements, roughly: of the values that the model on one device has."""
    loss(single, ids, targets).backward()
    found = [parameter.grad for parameter in single.parameters() if parameter.grad is not None]
    single.zero_grad()
    return max(float(nn.utils.get_total_norm(found)) / sqrt(sum(gradient.numel() for gradient in found)), _EPSILON)


def _optimizer(
    model: nn.Module, single: nn.Module, settings: Train, epsilon: float
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """The run's AdamW for the parameters of the model; for those of copies of the single one the same, by its names."""
    own = {id(parameter) for parameter in model.parameters()}
    names = [name for name, _ in single.named_parameters()]

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        given = list(parameters)
        if all(id(parameter) in own for parameter in given):
            made = make_optimizer(model, settings)
        else:
            some = zip(names, given, strict=True)
            made = adamw(((name, one, one.dim() > 1) for name, one in some if one.requires_grad), settings)
        for group in made.param_groups:
            group["eps"] = epsilon
        return made

    return make
