"""One planted bug, one working program, and how a program is run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.verification.attempt import Optimizer
from shardgrad.verification.clipping import Clip
from shardgrad.verification.pairing import Names
from shardgrad.verification.record import Batch, Loss


@dataclass
class Program:
    """A working program over a mesh, and the same on one device; the arguments of `sg.verify`.

    load: `load(single)` gives the parallel model one device's values.
    share: what a rank multiplies its squared gradients of a parameter with so that the sum over ranks is the norm's
        square: 1 for a shard, 1/p for a replica.
    reduce: what is done to each parameter's gradient as it arrives, where the program does it so.
    around: what a bug patches while the program runs.
    """

    parallel: nn.Module
    single: nn.Module
    batch: Batch
    mesh: DeviceMesh
    load: Callable[[nn.Module], None]
    share: Callable[[str], float]
    loss: Loss | None = None
    parallel_loss: Loss | None = None
    parallel_batch: Batch | None = None
    clip: Clip | None = None
    optimizer: Optimizer | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    reduce: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    names: Names | None = None
    padded: Collection[str] = ()


@dataclass(frozen=True)
class Mutant:
    """A bug.

    name: one for each; program: the program into which it is planted.
    plant: changes the program.
    origin: where it has happened.
    expected: the explanation that should be found; "" where the bug is caught, but no explanation of it is known.
    ranks: as few as the bug needs.
    """

    name: str
    program: str
    plant: Callable[[Program], None]
    origin: str
    expected: str
    ranks: int = 2


MADE_UP = "made up for this list"
Bug = Callable[..., Callable[[Callable[[Any], None]], Callable[[Any], None]]]


def enters(mutants: list[Mutant]) -> Bug:
    """A decorator, `bug(name, program, expected, origin)`, that enters a function which plants a bug into a model."""

    def bug(
        name: str, program: str, expected: str, origin: str = MADE_UP
    ) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        def enter(plant: Callable[[Any], None]) -> Callable[[Any], None]:
            mutants.append(Mutant(name, program, lambda p: plant(p.parallel), origin, expected))
            return plant

        return enter

    return bug


def sets(
    bug: Bug, name: str, program: str, expected: str, path: str, value: Callable[[Any], Any], origin: str = MADE_UP
) -> None:
    """Enter a bug that is another value of one attribute; `value` is given the model."""
    owner, _, attribute = path.rpartition(".")
    bug(name, program, expected, origin)(lambda model: setattr(model.get_submodule(owner), attribute, value(model)))


def hooks(
    bug: Bug, name: str, program: str, expected: str, parameter: str, change: Callable[[Any], Any],
    origin: str = MADE_UP,
) -> None:  # fmt: skip
    """Enter a bug that changes a parameter's gradient as it arrives; `change` is given the model."""
    bug(name, program, expected, origin)(lambda model: on_gradient(model, parameter, change(model)))


def on_gradient(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change a parameter's gradient as it arrives."""
    model.get_parameter(name).register_hook(change)
