"""`sg.verify`: one step of a sharded model against the same model on one device, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.agree import texts_of_all
from shardgrad.comm.mesh import MeshView, view
from shardgrad.errors import DisagreementError
from shardgrad.nn.dropout import Dropout
from shardgrad.verification import splits as how
from shardgrad.verification.attempt import Attempt, Optimizer, Side
from shardgrad.verification.bits import raw
from shardgrad.verification.by_design import by_design
from shardgrad.verification.clipping import Clip, clip_of
from shardgrad.verification.compare import VERDICTS, Measured, observe
from shardgrad.verification.decide import Judged
from shardgrad.verification.diagnose import MOST, Diagnosis, diagnose
from shardgrad.verification.fingerprint import fingerprint
from shardgrad.verification.pairing import Names, Pair, local_part, pair
from shardgrad.verification.place import Placer, modules_of
from shardgrad.verification.record import Batch, Key, Loss, all_tensors_in
from shardgrad.verification.report import Report
from shardgrad.verification.stated import stated
from shardgrad.verification.steps import Steps, by_requires_grad, judge


@told
def verify(
    parallel: nn.Module,
    single: nn.Module,
    batch: Tensor | Batch,
    mesh: DeviceMesh,
    *,
    loss: Loss | None = None,
    parallel_loss: Loss | None = None,
    parallel_batch: Tensor | Batch | None = None,
    splits: how.Named | None = None,
    names: Names | None = None,
    padded: Collection[str] = (),
    clip: Clip | None = None,
    optimizer: Optimizer | None = None,
    skip: Collection[str] = (),
    complete: Callable[[nn.Module], object] | None = None,
    perturb: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Hold one step of a sharded model against the same model on one device, and say what is rounding and what a bug.

    Compared are the outputs of modules, their gradients, the loss, the gradient of every parameter and of the input,
    the norm of all gradients before clipping, and the parameters after an optimizer step; each on every rank. The
    yardstick of a tensor is how far one device in the working precision is from float64, over runs whose sums go in
    different orders; docs/verify.md says how far beyond it a tensor may be. A second step, with other values, is made
    in float64 on both sides: it tells a mistake from a point on a jump, and shows what the working precision hides.

    `single` is not changed: copies of it get the parallel model's values. `parallel` is changed while it runs, and its
    parameters, buffers and gradients restored. Call it on every rank of the mesh; each computes `single` itself.

    Args:
        parallel: shardgrad's layers, DTensors (`parallelize_module`), Megatron-core's or fairscale's, or any module
            whose parameters are local shards.
        single: the same model on one device; any values.
        batch: what `loss` is given after the model: a tensor, a sequence, or a mapping of keywords; the whole of it,
            alike on every rank.
        mesh: the mesh over which `parallel` is split.
        loss: `loss(model, *batch)` returns a scalar loss, or an output, which is then given a random gradient. By
            default the model is called.
        parallel_loss, parallel_batch: where they differ for `parallel` (sharded logits, this rank's sequences).
        splits: how tensors of `parallel` lie on the mesh, where neither they nor their layers say and their shapes
            leave it open: `{"fc1.weight": "W[m/tp,d]"}`, for parameters, for modules' outputs under the module's name
            (`"fc2": "Y[n,m]{tp}"` for terms of a sum), for gradients of outputs under `"fc2.grad"`, for `"loss"`.
            Braces on a parameter mean that its gradient is left unsummed.
        names: parallel's names of parameters (and modules) to single's, where they differ.
        padded: parameters that are larger in `parallel` (a padded vocabulary): what lies beyond must get no gradient.
        clip: `clip(model, max_norm)` scales the gradients and returns their norm before. By default that of shardgrad,
            or torch's for DTensors; of other models the norm is not compared.
        optimizer: `optimizer(parameters)`; by default plain gradient descent. It must have no state yet.
        complete: `complete(parallel)` is called after backward, where gradients are complete only then: of gradients
            that layers leave partial, `sg.all_reduce_partial_grads_`.
        skip: tensors to leave out, by name or pattern: a module's output, its gradient (`fc1.grad`), the loss.
        perturb: whether parameters that are constant (zero biases, unit norms), or whose shards are alike on all ranks,
            are moved first, as they would hide what is wrong.
        seed: of all that is random here.
        progress: told what is being done, a few words at a time.

    Raises:
        LayoutError: names or splits that are missing, unknown or ambiguous, with the nearest ones.
        ShapeError: shapes that do not fit together.
        DisagreementError: the ranks were given different batches.
        ValueError: dropout is active, which makes runs differ.
    """
    _refuse_dropout(parallel, single)
    mesh_view = view(mesh)
    _refuse_other_batches(_batch(batch), mesh_view)
    tell = progress or (lambda said: None)
    given = how.Splits(splits or {}, mesh_view)
    pairs, held = pair(parallel, single, mesh_view, given, names, list(padded))
    if complete is not None:
        pairs = [replace(one, unsummed=()) for one in pairs]
    values = [how.assemble(parts, one.split, one.shape, mesh_view) for one, parts in zip(pairs, held)]
    said = how.outputs_by_layers(parallel)
    placer = Placer(pairs, modules_of(parallel, single, pairs, names), list(padded), mesh_view, given, said, list(skip))
    attempt = Attempt(
        Side(parallel, _batch(batch if parallel_batch is None else parallel_batch), parallel_loss or loss or _call),
        Side(single, _batch(batch), loss or _call),
        mesh_view,
        pairs,
        values,
        placer,
        clip or clip_of(parallel),
        optimizer,
        {name: local_part(buffer.detach()).clone() for name, buffer in parallel.named_buffers()},
        perturb,
        complete,
    )
    replicas = [_replicas(one, value, parts, mesh_view) for one, value, parts in zip(pairs, values, held)]
    drifted = [one for one in judge(replicas, mesh_view).values() if not one.row.ok]
    with _restored(parallel, attempt.buffers.values()):
        steps = Steps(attempt, seed, tell)
        found = {one.measured.key: one for one in drifted} | steps.judged()
    found = by_requires_grad(found, pairs, single, mesh_view)
    for key, one in found.items():
        if key in placer.unsure and one.row.verdict != "rounding":
            placer.skipped[f"{key[0]} of {key[1]}"] = _TERMS if key[1] in said else _BETWEEN
    found = {
        key: one for key, one in found.items()
        if (key not in placer.unsure or one.row.verdict == "rounding") and not _no_news(one, steps.changed_buffers)
    }  # fmt: skip
    placer.check_used()
    wrong = sorted((key for key, one in found.items() if not one.row.ok), key=lambda key: found[key].row.order)
    left_out = "loss of loss" in placer.skipped
    observed = {key: observe(found[key].measured, mesh_view) for key in wrong}
    for key, verdict in by_design(
        {key: one.row for key, one in found.items()}, observed, steps.ends, loss_left_out=left_out
    ).items():
        found[key] = found[key].called(verdict)
        del observed[key]
    findings, rows = tuple(observed.values()), [one.row for one in found.values()]
    diagnoses: tuple[Diagnosis, ...] = ()
    if findings:
        tell("explanations")
        said_already = stated(found[next(iter(observed))].row)
        diagnoses = (said_already,) if said_already else diagnose(findings, steps.known(list(observed)[:MOST]))
    return Report(
        rows=tuple(sorted(rows, key=lambda row: (row.ok, -row.score, row.order))),
        findings=findings,
        diagnoses=diagnoses,
        skipped=placer.skipped,
        mesh_shape=dict(mesh_view.shape),
        dtype=", ".join(dict.fromkeys(str(value.dtype).removeprefix("torch.") for value in values)),
        runs=steps.runs,
        notes=steps.notes,
    )


_BETWEEN = (
    "a module between sharded layers: nothing says how what it returns is stored, or whether its gradient is a term of "
    "a sum, and its values are right in no place that is known. (The layers around it are compared)"
)


_TERMS = "ranks or heads share what the layer makes, so that each has a term of its gradient"


def _replicas(one: Pair, value: Tensor, held: Sequence[Tensor], mesh: MeshView) -> Measured:
    """Whether every rank holds the very bits of the global value that the first holder has."""
    wanted = one.split.shard(value, mesh.shape, mesh.coordinate)
    local = local_part(one.parameter.detach())
    same = torch.equal(raw(local), raw(wanted))
    key: Key = ("value", one.name)
    far = 0.0 if same else float((local.double() - wanted.double()).norm())
    numbers = (VERDICTS.index("rounding" if same else "replicas differ"), far, 0.0, far, 1.0, far, 1.0, 0.0, -1)
    full = value.double()
    return Measured(key, one.split, one.shape, local, full, None, numbers)


def _no_news(one: Judged, changed: Collection[str]) -> bool:
    """Whether it is a buffer that no step changes, and which is right."""
    return one.row.kind == "buffer" and one.row.ok and one.row.name not in changed


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _batch(batch: Tensor | Batch) -> Batch:
    return (batch,) if isinstance(batch, Tensor) else batch


def _refuse_other_batches(batch: Batch, mesh: MeshView) -> None:
    """Each rank computes `single` itself, of what should be one batch."""
    parts = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    said = json.dumps({str(name): [_bits(tensor) for tensor in all_tensors_in(part)] for name, part in parts})
    texts = texts_of_all(said, mesh)
    differ = {
        name for text in texts for name, bits in json.loads(text).items() if json.loads(texts[0]).get(name) != bits
    }
    if differ:
        raise DisagreementError(
            "verify: batch is the whole one, alike on every rank, but the ranks have different values in "
            f"{', '.join(sorted(differ))}: make it from one seed on all of them, and give this rank's part as "
            "parallel_batch"
        )


def _bits(tensor: Tensor) -> int:
    plain = tensor.layout == torch.strided and not tensor.is_nested
    return int(fingerprint(tensor)) if plain else 0


_DROPOUT = (Dropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _refuse_dropout(*models: nn.Module) -> None:
    for model in models:
        for name, module in model.named_modules():
            rate = getattr(module, "p", 0.0) if isinstance(module, _DROPOUT) else 0.0
            if module.training and rate > 0:
                raise ValueError(
                    f"{name} drops out at random (p={rate}), so that no two runs are alike: call eval() on both models"
                )


@contextmanager
def _restored(model: nn.Module, buffers: Iterable[Tensor]) -> Iterator[None]:
    """Put parameters, buffers, of which these are copies, and gradients back as they were."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [*(local_part(parameter.detach()).clone() for parameter in model.parameters()), *buffers]
    kept = (getattr(parameter, "main_grad", None) for parameter in model.parameters())
    sums = [total for total in kept if isinstance(total, Tensor)]
    tensors += sums
    before += [total.clone() for total in sums]
    gradients = [parameter.grad for parameter in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                local_part(tensor.detach()).copy_(value)
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = gradient
