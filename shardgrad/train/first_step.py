"""What is proved of a run before it trains: its first step, against one device and against the prediction."""

from __future__ import annotations

from functools import partial

from shardgrad.comm.collectives import gather_ints
from shardgrad.comm.mesh import view
from shardgrad.comm.trace import trace
from shardgrad.train import data
from shardgrad.train.compare import BOUND, compare
from shardgrad.train.config import Config
from shardgrad.train.metrics import Metrics
from shardgrad.train.model import GPT
from shardgrad.train.predict import step_collectives, totals
from shardgrad.train.reference import ReferenceGPT
from shardgrad.train.report import Report


class CheckError(RuntimeError):
    """The first step is not what one device, or the prediction of bytes, says; the report has shown where."""


def check_first_step(
    model: GPT, config: Config, text: data.Text, report: Report, metrics: Metrics, step: int = 0
) -> None:
    """Run the first step's forward and backward; compare its bytes, its loss and every gradient. On every rank.

    Leaves the gradients in place and the parameters as they were. step: of the batch, the steps done before.

    Raises:
        CheckError: on every rank, if on any of them predicted and traced bytes differ, or a tensor is farther from
            exact than `BOUND` times one device's rounding.
    """
    mesh_view = view(model.mesh)
    axis = mesh_view.axis(model.axis)
    batch, seq_len = config.train.batch, config.model.seq_len
    ids, targets = (t.to(mesh_view.device) for t in data.batch(text, config.run.seed, step, batch, seq_len))
    for _ in range(2):  # in the first pass, layers also compare with their peers what they see for the first time
        model.zero_grad()
        with trace() as traced:
            loss = model.loss(ids, targets)
            loss.backward()
    predicted = totals(step_collectives(model, batch, seq_len, loss.dtype))
    mine = [sum(size for _, size in predicted.values()), traced.bytes, int(predicted == traced.totals())]
    by_rank = [(row[0], row[1], bool(row[2])) for row in gather_ints(mine, axis, mesh_view.device, "bytes of a step")]
    report.bytes(predicted, traced.totals(), by_rank)
    by_operation = [[*key, *value] for key, value in sorted(traced.totals().items())]
    metrics.write(
        "bytes", step=step, by_operation=by_operation, by_rank=[{"predicted": p, "traced": t} for p, t, _ in by_rank]
    )
    reference = partial(ReferenceGPT, **config.model.model_dump(), vocab=model.vocab)
    comparison = compare(model, loss, ids, targets, reference)
    failed = False
    if comparison is not None:
        report.comparison(comparison)
        failed = not comparison.passed
        ratios = {row.name: row.ratio for row in comparison.worst_first}
        metrics.write("comparison", step=step, passed=comparison.passed, allowed=BOUND, times_rounding=ratios)
    if any(row[0] for row in gather_ints([int(failed)], axis, mesh_view.device, "the result of the comparison")):
        raise CheckError("the first step differs from one device: not training on wrong gradients")
    if not all(equal for _, _, equal in by_rank):
        raise CheckError("the first step sends other bytes than its layouts say: not training on it")
