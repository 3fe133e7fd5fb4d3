"""`verify_gradients`: a step that a program has just done, its loss and every gradient, against one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.mesh import MeshView, view
from shardgrad.layout.notation import TensorSpec
from shardgrad.nn.shardings import named_shardings
from shardgrad.ops.shard import unshard
from shardgrad.verification.compare import Measured, measure, observe, rows_of
from shardgrad.verification.diagnose import MOST, diagnose
from shardgrad.verification.exchange import coordinates, from_first, place
from shardgrad.verification.hypothesis import Context
from shardgrad.verification.observed import Split
from shardgrad.verification.pairing import Names, fit, translate
from shardgrad.verification.record import LOSS, Key, gradient_of
from shardgrad.verification.report import Report
from shardgrad.verification.rounding import RUNS, Reordered, Spread


def verify_gradients(
    parallel: nn.Module,
    loss: Tensor,
    mesh: DeviceMesh,
    single: Callable[[], nn.Module],
    single_loss: Callable[[nn.Module], Tensor],
    *,
    names: Names | None = None,
    seed: int = 0,
) -> Report:
    """Say of a step's loss and gradients, in place and complete, what is rounding and what a bug; on every rank.

    The yardstick is that of `verify`, which runs the step itself. Here the step is the program's own, with its
    micro-batches and its values. The first rank alone computes it on one device; of what this gives, each rank gets
    one tensor at a time and keeps none.

    Args:
        parallel: a model of shardgrad's layers.
        loss: of the step, of the whole batch, alike on every rank.
        single: makes the same model on one device, with any values; called on the first rank.
        single_loss: the loss of that model, in float64 and in the working precision, for the whole batch at once.
        names: parallel's names of parameters to single's, where they differ.
        seed: of the orders in which one device sums.

    Returns:
        The report, the same on every rank; its findings are the first tensors that are wrong.

    Raises:
        ValueError: a parameter belongs to no shardgrad layer, or single has one that parallel has not.
    """
    mesh_view = view(mesh)
    first = place(mesh_view) == 0
    step: dict[Key, tuple[Split, tuple[int, ...], Tensor | None]] = {LOSS: (Split.of([]), (), loss)}
    values: dict[str, Tensor] = {}
    for name, parameter, sharding in reversed(named_shardings(parallel)):  # backward comes to the last layers first
        if sharding is None:
            raise ValueError(f"{name} belongs to no shardgrad layer: nothing says how it is stored")
        value = unshard(parameter.detach(), sharding.spec, sharding.mesh, sharding.sizes)
        if first:
            values[name] = value
        if parameter.requires_grad:
            split = Split(TensorSpec(sharding.spec.name, sharding.spec.dims))
            step["gradient", name] = split, tuple(sharding.shape), gradient_of(parameter)
    shapes = {key: shape for key, (_, shape, _) in step.items()}
    blocks = max(len(coordinates(mesh_view)), 2)
    spreads = _one_device(single, single_loss, values, names, shapes, loss.device, blocks, seed) if first else {}

    def measured(keys: Iterable[Key]) -> Iterator[Measured]:
        for order, key in enumerate(keys):
            split, shape, tensor = step[key]
            spread = _everywhere(spreads.get(key), shape, mesh_view)
            yield measure(key, split, shape, tensor, spread, order, mesh_view)

    rows = rows_of([replace(one, local=None, exact=None, scale=None) for one in measured(step)], mesh_view)
    wrong = list(measured([(row.kind, row.name) for row in rows if not row.ok][:MOST]))
    findings = tuple(observe(one, mesh_view) for one in wrong)
    known = Context(exact={one.key: (one.exact, one.split) for one in wrong if one.exact is not None})
    return Report(
        rows=tuple(sorted(rows, key=lambda row: (row.ok, -row.score, row.order))),
        findings=findings,
        diagnoses=diagnose(findings, known),
        skipped={},
        mesh_shape=dict(mesh_view.shape),
        dtype=", ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parallel.parameters())),
        runs=RUNS,
    )


def _one_device(
    single: Callable[[], nn.Module],
    single_loss: Callable[[nn.Module], Tensor],
    values: Mapping[str, Tensor],
    names: Names | None,
    shapes: Mapping[Key, tuple[int, ...]],
    device: torch.device,
    blocks: int,
    seed: int,
) -> dict[Key, Spread]:
    """Loss and gradients of one device in float64, and their errors over its runs in the working precision."""
    with torch.random.fork_rng(devices=()):  # making a model draws numbers that other ranks do not draw
        model = single().to(device)
    own = dict(model.named_parameters(remove_duplicate=False))
    targets = {name: own[translate(names, name)] for name in values}
    missing = [name for name, one in own.items() if all(one is not target for target in targets.values())]
    if missing:
        raise ValueError(f"no parameter of the sharded model is single's {', '.join(missing)}")

    def run(dtype: torch.dtype | None) -> dict[Key, Tensor]:
        for name, target in targets.items():
            target.grad = None
            target.data = fit(values[name], target.shape).to(dtype or values[name].dtype).clone()
        loss = single_loss(model)
        loss.backward()
        found: dict[Key, Tensor] = {LOSS: loss.detach()}
        for name, target in targets.items():
            grad = torch.zeros_like(target) if target.grad is None else target.grad
            found["gradient", name] = grad.detach()
        return {key: fit(found[key], shape) for key, shape in shapes.items()}

    spreads = {key: Spread(tensor) for key, tensor in run(torch.float64).items()}
    for at in range(RUNS):
        if at == 0:
            found = run(None)
        else:
            with Reordered(blocks, 1000 * seed + at):
                found = run(None)
        for key, tensor in found.items():
            spreads[key].add(tensor)
    return spreads


def _everywhere(spread: Spread | None, shape: tuple[int, ...], mesh: MeshView) -> Spread:
    """The first rank's spread, on every rank."""
    if spread is None:
        empty = torch.zeros(shape, dtype=torch.float64, device=mesh.device)
        spread = Spread(empty, empty, [0.0] * RUNS)
    norms = from_first(torch.tensor(spread.norms, dtype=torch.float64, device=mesh.device), mesh)
    return Spread(from_first(spread.exact, mesh), from_first(spread.squares, mesh), norms.tolist())
