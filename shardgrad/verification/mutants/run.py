"""Run programs with and without a bug: through verification, and through the checks that are usually made."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed.device_mesh import init_device_mesh

from shardgrad.verification.mutants import by_hand, hand_planted
from shardgrad.verification.mutants.mutant import Mutant, Program
from shardgrad.verification.report import Report
from shardgrad.verification.verify import verify

STEPS = 30
RATE = 0.02


def programs(ranks: int) -> dict[str, Callable[[], Program]]:
    """The working programs, which are built anew for every bug."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    return {
        hand_planted.TP: lambda: by_hand.program(mesh),
        hand_planted.SP: lambda: by_hand.program(mesh, sp=True),
    }


def mutants() -> list[Mutant]:
    return [*hand_planted.MUTANTS]


def verified(program: Program, seed: int = 0) -> Report:
    with program.around():
        return verify(
            program.parallel, program.single, program.batch, program.mesh, loss=program.loss,
            parallel_loss=program.parallel_loss, parallel_batch=program.parallel_batch, splits=program.splits,
            clip=program.clip, optimizer=program.optimizer, seed=seed,
        )  # fmt: skip
