"""`verify_gradients`: a step that a program has just done, its loss and every gradient, against one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.mesh import MeshView, view
from shardgrad.nn.shardings import named_shardings
from shardgrad.verification import splits as how
from shardgrad.verification.compare import Measured, measure, observe, rows_of
from shardgrad.verification.diagnose import MOST, diagnose
from shardgrad.verification.exact import InFloat64
from shardgrad.verification.exchange import coordinates, from_first, place
from shardgrad.verification.hypothesis import Context
from shardgrad.verification.observed import Split
from shardgrad.verification.pairing import Names, fit, translate
from shardgrad.verification.record import LOSS, Key, gradient_of
from shardgrad.verification.report import Report, Row
from shardgrad.verification.rounding import RUNS, Reordered, Spread

FEW = 3
"""Runs of one device that are enough for a step in which all is rounding. Where a tensor differs by more than these
allow, there are as many as `verify` makes, and those decide."""


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
    micro-batches and its values. The first rank alone computes it on one device, so that one model must fit there;
    the others get what it found one tensor at a time, and keep none.

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
    layers_say = bool(how.outputs_by_layers(parallel))
    for name, parameter, sharding in reversed(named_shardings(parallel)):  # backward comes to the last layers first
        if sharding is None and not layers_say:
            raise ValueError(f"{name} belongs to no shardgrad layer: nothing says how it is stored")
        value = parameter.detach() if sharding is None else sharding.unshard(parameter)
        if first:
            values[name] = value
        if parameter.requires_grad:
            split = Split.of([()] * value.dim())  # between layers of `sg.parallelize`, which sums what is to be summed
            if sharding is not None:
                split = how.of_sharding(sharding, mesh_view, name).summed_over(())
            step["gradient", name] = split, tuple(value.shape), gradient_of(parameter)
    shapes = {key: shape for key, (_, shape, _) in step.items()}
    blocks = max(len(coordinates(mesh_view)), 2)
    device = _OneDevice(single, single_loss, values, names, shapes, loss.device, blocks, seed) if first else None

    def measured(keys: Iterable[Key], runs: int) -> Iterator[Measured]:
        spreads = device.spreads(runs) if device is not None else {}
        for order, key in enumerate(keys):
            split, shape, tensor = step[key]
            spread = _everywhere(spreads.get(key), runs, shape, mesh_view)
            yield measure(key, split, shape, tensor, spread, order, mesh_view)

    runs, rows = FEW, _rows(measured(step, FEW), mesh_view)
    if any(not row.ok for row in rows):
        runs, rows = RUNS, _rows(measured(step, RUNS), mesh_view)
    wrong = list(measured([(row.kind, row.name) for row in rows if not row.ok][:MOST], runs))
    findings = tuple(observe(one, mesh_view) for one in wrong)
    known = Context(exact={one.key: (one.exact, one.split) for one in wrong if one.exact is not None})
    return Report(
        rows=tuple(sorted(rows, key=lambda row: (row.ok, -row.score, row.order))),
        findings=findings,
        diagnoses=diagnose(findings, known),
        skipped={},
        mesh_shape=dict(mesh_view.shape),
        dtype=", ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parallel.parameters())),
        runs=runs,
    )


def _rows(measured: Iterable[Measured], mesh: MeshView) -> list[Row]:
    """The rows of tensors that are not kept."""
    return rows_of([replace(one, local=None, exact=None, spread=None) for one in measured], mesh)


class _OneDevice:
    """Loss and gradients of one device in float64, and their errors over its runs in the working precision.

    values, names: the parameters, by the sharded model's names, and what they are called here.
    shapes: of what is compared, as the sharded model stores it.
    blocks, seed: of the sums' order.
    """

    def __init__(
        self,
        single: Callable[[], nn.Module],
        loss: Callable[[nn.Module], Tensor],
        values: Mapping[str, Tensor],
        names: Names | None,
        shapes: Mapping[Key, tuple[int, ...]],
        device: torch.device,
        blocks: int,
        seed: int,
    ) -> None:
        with torch.random.fork_rng(devices=()):  # making a model draws numbers that other ranks do not draw
            self._model = single().to(device)
        own = dict(self._model.named_parameters(remove_duplicate=False))
        self._targets = {name: own[translate(names, name)] for name in values}
        missing = [name for name, one in own.items() if all(one is not target for target in self._targets.values())]
        if missing:
            raise ValueError(f"no parameter of the sharded model is single's {', '.join(missing)}")
        self._loss, self._values, self._shapes = loss, values, shapes
        self._blocks, self._seed = blocks, seed
        self._spreads = {key: Spread(tensor) for key, tensor in self._run(torch.float64).items()}
        self._runs = 0

    def spreads(self, runs: int) -> Mapping[Key, Spread]:
        """The errors of at least so many runs."""
        while self._runs < runs:
            order = Reordered(self._blocks, 1000 * self._seed + self._runs) if self._runs else nullcontext()
            with order:
                found = self._run(None)
            for key, tensor in found.items():
                self._spreads[key].add(tensor)
            self._runs += 1
        return self._spreads

    def _run(self, dtype: torch.dtype | None) -> dict[Key, Tensor]:
        for name, target in self._targets.items():
            value = self._values[name]
            target.grad = None
            target.data = fit(value, target.shape).to(dtype or value.dtype).clone()
        with nullcontext() if dtype is None else InFloat64():
            loss = self._loss(self._model)
            loss.backward()
        found: dict[Key, Tensor] = {LOSS: loss.detach()}
        for name, target in self._targets.items():
            grad = torch.zeros_like(target) if target.grad is None else target.grad
            found["gradient", name] = grad.detach()
        return {key: fit(found[key], shape) for key, shape in self._shapes.items()}


def _everywhere(spread: Spread | None, runs: int, shape: tuple[int, ...], mesh: MeshView) -> Spread:
    """The first rank's spread, on every rank, in one collective an axis."""
    if spread is None:
        sent = torch.zeros(2 * torch.Size(shape).numel() + runs, dtype=torch.float64, device=mesh.device)
    else:
        norms = torch.tensor(spread.norms, dtype=torch.float64, device=mesh.device)
        sent = torch.cat([spread.exact.view(-1), spread.squares.view(-1), norms])
    count = (len(sent) - runs) // 2
    exact, squares, norms = from_first(sent, mesh).split([count, count, runs])
    return Spread(exact.view(shape), squares.view(shape), norms.tolist())
