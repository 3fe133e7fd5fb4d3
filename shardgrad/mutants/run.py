"""Run programs with and without a bug: through verification, and through the checks that are usually made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from shardgrad.mutants import by_hand, decoder, decoder_planted, hand_planted, layers_planted, micro_batches
from shardgrad.mutants.mutant import Mutant, Program
from shardgrad.verification.report import Report
from shardgrad.verification.verify import verify

STEPS, RATE = 30, 0.05
LOSS_WITHIN, NORM_WITHIN = 0.01, 0.05
"""The usual checks: the loss falls; after so many steps it is within 1 % of one device's; the first step's gradient
norm is within 5 %."""


def programs(ranks: int) -> dict[str, Callable[[], Program]]:
    """The working programs, which are built anew for every bug."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    return {
        hand_planted.TP: partial(by_hand.program, mesh),
        hand_planted.SP: partial(by_hand.program, mesh, sp=True),
        decoder_planted.TP: partial(decoder.program, mesh),
        decoder_planted.SP: partial(decoder.program, mesh, sp=True),
        micro_batches.NAME: partial(micro_batches.program, mesh),
        **{name: partial(make, mesh) for name, make in layers_planted.PROGRAMS.items()},
    }


def mutants() -> list[Mutant]:
    """Those whose program is installed."""
    installed = [one for one in layers_planted.MUTANTS if one.program in layers_planted.PROGRAMS]
    return [*hand_planted.MUTANTS, *decoder_planted.MUTANTS, *micro_batches.MUTANTS, *installed]


def verified(program: Program, seed: int = 0) -> Report:
    """What `sg.verify` says of a program."""
    with program.around():
        return verify(
            program.parallel, program.single, program.batch, program.mesh, loss=program.loss,
            parallel_loss=program.parallel_loss, parallel_batch=program.parallel_batch, splits=program.splits,
            clip=program.clip, optimizer=program.optimizer, seed=seed, names=program.names, padded=program.padded,
        )  # fmt: skip


@dataclass(frozen=True)
class Usual:
    """Whether a program passes the usual checks, and what they measured.

    loss, loss_single: after the last step; norm, norm_single: of all gradients of the first step.
    """

    falls: bool
    loss: float
    loss_single: float
    norm: float
    norm_single: float

    @property
    def loss_agrees(self) -> bool:
        return abs(self.loss - self.loss_single) <= LOSS_WITHIN * abs(self.loss_single)

    @property
    def norm_agrees(self) -> bool:
        return abs(self.norm - self.norm_single) <= NORM_WITHIN * self.norm_single

    @property
    def passes(self) -> bool:
        return self.falls and self.loss_agrees and self.norm_agrees


def usual(program: Program, steps: int = STEPS) -> Usual:
    """Train both models from the same values for a few steps."""
    single = _train(program.single, program, program.loss, program.batch, steps, one_device=True)
    batch = program.batch if program.parallel_batch is None else program.parallel_batch
    with program.around():
        losses, norm = _train(program.parallel, program, program.parallel_loss or program.loss, batch, steps)
    return Usual(
        isfinite(losses[-1]) and losses[-1] < losses[0], losses[-1], single[0][-1], norm, single[1]
    )  # fmt: skip


def _train(
    model: nn.Module, program: Program, loss: Callable | None, batch: object, steps: int, one_device: bool = False
) -> tuple[list[float], float]:
    """The losses as this rank sees them, and the first step's gradient norm."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, foreach=False)
    if program.optimizer is not None and not one_device:
        optimizer = program.optimizer(model.parameters())  # type: ignore[assignment]
    losses, norm = [], 0.0
    for step in range(steps + 1):
        optimizer.zero_grad()
        value = model(*batch) if loss is None else loss(model, *batch)  # type: ignore[misc]
        losses.append(float(value.detach()))
        if step == steps:
            break
        value.backward()
        if program.clip is not None:
            clip = nn.utils.clip_grad_norm_ if one_device else None
            total = clip(model.parameters(), 1.0) if clip else program.clip(model, 1.0)
        else:
            total = _norm(model, program, one_device)
        norm = float(total) if step == 0 else norm
        optimizer.step()
    return losses, norm


def _norm(model: nn.Module, program: Program, one_device: bool) -> Tensor:
    square = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            square += local.double().square().sum() * (1.0 if one_device else program.share(name))
    if not one_device:
        dist.all_reduce(square)
    return square.sqrt()


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant. named: whether the diagnosis is the expected one (none, where none is known)."""

    name: str
    program: str
    origin: str
    expected: str
    caught: bool
    named: bool
    found: tuple[str, ...]
    first: str
    usual: dict


def try_one(mutant: Mutant, make: Callable[[], Program], steps: int = STEPS) -> Outcome:
    """Plant the bug, verify, and train."""
    program = make()
    mutant.plant(program)
    report = verified(program)
    found = tuple(fit.name for diagnosis in report.diagnoses for fit in diagnosis.fits)
    named = not report.ok and (mutant.expected in found if mutant.expected else not found)
    first = "" if report.first is None else f"{report.first.kind} of {report.first.name}"
    checks = _checked(make, mutant, steps)
    return Outcome(
        mutant.name, mutant.program, mutant.origin, mutant.expected, not report.ok, named, found, first, checks
    )


def control(name: str, make: Callable[[], Program], steps: int = STEPS) -> Outcome:
    """The program without a bug, which must not be accused."""
    report = verified(make())
    return Outcome("(none)", name, "", "", not report.ok, report.ok, (), "", _checked(make, None, steps))


def _checked(make: Callable[[], Program], mutant: Mutant | None, steps: int) -> dict:
    program = make()
    if mutant is not None:
        mutant.plant(program)
    checks = usual(program, steps)
    measured = {key: value if isfinite(value) else None for key, value in asdict(checks).items()}
    return {**measured, "loss_agrees": checks.loss_agrees, "norm_agrees": checks.norm_agrees,
            "passes": checks.passes}  # fmt: skip
