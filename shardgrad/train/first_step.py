"""What is proved of a run before it trains: its first step, against one device and against the prediction."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import inf

import torch
from torch import Tensor, nn

from shardgrad.comm.collectives import gather_ints
from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.trace import trace_collectives
from shardgrad.layout.cost import totals
from shardgrad.nn.global_ops import clip_grad_norm_
from shardgrad.train import data
from shardgrad.train.build import build_one_device, one_device_name
from shardgrad.train.config import Config
from shardgrad.train.decoder import Decoder
from shardgrad.train.language_model import LanguageModel, evaluating
from shardgrad.train.metrics import Metrics
from shardgrad.train.predict import step_collectives
from shardgrad.train.reference import name_here
from shardgrad.train.report import Report
from shardgrad.train.step import backward
from shardgrad.verification import report as verification
from shardgrad.verification.gradients import verify_gradients


class CheckError(RuntimeError):
    """The first step is not what one device, or the prediction of bytes, says; the report has shown where."""


def check_first_step(
    model: LanguageModel, config: Config, text: data.Text, report: Report, metrics: Metrics, step: int = 0
) -> None:
    """Run the first step without its update; compare its bytes, its loss and every gradient. On every rank.

    Leaves gradients in place, parameters and the random state as they were: nothing is dropped. With `run.check`
    off, only the bytes are compared.
    step: of the batch, the steps done before.

    Raises:
        CheckError: on every rank, if on any of them predicted and traced bytes differ, or a tensor differs from one
            device by more than rounding.
    """
    mesh_view = view(model.mesh)
    batch, seq_len, settings = config.train.batch, config.model.seq_len, config.train
    ids, targets = (t.to(mesh_view.device) for t in data.batch(text, config.run.seed, step, batch, seq_len))
    drops = isinstance(
        model, Decoder
    )  # a model of transformers drops nothing, and computes blocks again in training alone
    for _ in range(2):  # in the first pass, layers also compare with their peers what they see for the first time
        model.zero_grad()
        with trace_collectives() as traced, evaluating(model) if drops else nullcontext():
            loss = backward(model, ids, targets, settings.accumulate)
            if settings.clip is not None:
                clip_grad_norm_(model, inf)
    predicted = None
    if isinstance(model, Decoder):
        rows = step_collectives(model, batch, seq_len, accumulate=settings.accumulate, clip=settings.clip is not None)
        predicted = totals(rows)
    wanted = traced.totals() if predicted is None else predicted
    mine = [sum(size for _, size in wanted.values()), traced.bytes, int(wanted == traced.totals())]
    by_rank = [(row[0], row[1], bool(row[2])) for row in _everyones(mine, mesh_view, "bytes of a step")]
    report.bytes(predicted, traced.totals(), by_rank)
    by_operation = [[*key, *value] for key, value in sorted(traced.totals().items())]
    shown = [{"predicted": None if predicted is None else p, "traced": t} for p, t, _ in by_rank]
    metrics.write("bytes", step=step, by_operation=by_operation, by_rank=shown)
    if config.run.check:
        single = partial(build_one_device, config, model.vocab)
        found = compare(model, loss, ids, targets, single, one_device_name(config))
        report.comparison(found)
        metrics.write(
            "comparison",
            step=step,
            passed=found.ok,
            times_rounding={row.name: row.ratio for row in found.rows},
            of_allowed={row.name: row.score for row in found.rows},
        )
        if not found.ok:
            raise CheckError("the first step differs from one device: not training on wrong gradients")
    if not all(equal for _, _, equal in by_rank):
        raise CheckError("the first step sends other bytes than its layouts say: not training on it")


def compare(
    model: LanguageModel,
    loss: Tensor,
    ids: Tensor,
    targets: Tensor,
    reference: Callable[[], nn.Module],
    names: Callable[[str], str] | None = name_here,
) -> verification.Report:
    """Hold a step just done against one device, by the yardstick of `sg.verify`; called on every rank.

    Args:
        loss: of the whole batch, as the step found it.
        ids, targets: the whole batch [b, s], which one device takes at once.
        reference: makes the model on one device, with any values; its `loss` is as of `Reference`.
        names: a parameter's name there, from that of the model; None: the same.
    """

    def reference_loss(single: nn.Module) -> Tensor:
        exact = next(single.parameters()).dtype == torch.float64
        mean: Callable[..., Tensor] = single.loss  # type: ignore[assignment]
        return mean(ids, targets, None if exact else model.compute_dtype)

    return verify_gradients(model, loss, model.mesh, reference, reference_loss, names=names)


def _everyones(mine: list[int], mesh_view: MeshView, what: str) -> list[list[int]]:
    """The integers of every rank of the mesh, in the order of the ranks."""
    rows = [mine]
    for axis in reversed(mesh_view.axes.values()):
        flat = [value for row in rows for value in row]
        if axis.size > 1:
            gathered = gather_ints(flat, axis, mesh_view.device, what)
            flat = [value for row in gathered for value in row]
        rows = [flat[at : at + len(mine)] for at in range(0, len(flat), len(mine))]
    return rows
