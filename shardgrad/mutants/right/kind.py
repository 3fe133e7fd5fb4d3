"""One right program, and what such programs are built of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.mutants.by_hand import Group
from shardgrad.mutants.mutant import Program
from shardgrad.verification.record import mapped

HALVES = (torch.float32, torch.bfloat16, torch.float16)
FULL = (torch.float32,)
TERM: Mapping[str, str] = {"loss": "L[]{dp}"}
"""Of a rank over dp whose loss is a term of the sum."""


@dataclass(frozen=True)
class Kind:
    """A kind of right program.

    name: one for each; make: builds it on a mesh with the one axis `tp`, in a precision.
    dtypes: of its parameters, those in which such a program is run.
    """

    name: str
    make: Callable[[DeviceMesh, torch.dtype], Program]
    dtypes: tuple[torch.dtype, ...] = HALVES


Storage = int | Callable[[Tensor], Tensor] | None
"""How a rank stores a parameter: sharded along a dim as torch.chunk does, by a function of the whole, or whole."""


class Stored(nn.Module):
    """A module whose parameters are local shards; `storage` says how, by the parameter's name."""

    storage: dict[str, Storage]

    def hold(self, tp: Group, **parameters: tuple[tuple[int, ...], Storage]) -> None:
        """Register parameters of these global shapes."""
        self.tp, self.storage = tp, {}
        for name, (shape, how) in parameters.items():
            self.register_parameter(name, nn.Parameter(part(torch.zeros(shape), how, tp)))
            self.storage[name] = how


def part(whole: Tensor, how: Storage, tp: Group) -> Tensor:
    """What this rank stores of a global tensor; an empty part where there are fewer rows than ranks."""
    if how is None:
        return whole.clone()
    if callable(how):
        return how(whole).clone()
    chunks = whole.chunk(tp.size, how)
    return chunks[tp.index].clone() if tp.index < len(chunks) else whole.narrow(how, 0, 0).clone()


def storages(model: nn.Module) -> dict[str, Storage]:
    """How every parameter is stored, by its name in the model."""
    return {
        f"{path}.{name}" if path else name: how
        for path, module in model.named_modules()
        for name, how in getattr(module, "storage", {}).items()
    }


def fill(model: nn.Module, seed: int = 7) -> None:
    """Random values: matrices that keep the size of what they multiply, vectors of a quarter, gains near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                gain = name.rpartition(".")[2] in ("weight", "gain")
                parameter.copy_(1 + noise / 4 if gain else noise / 4)
            else:
                fan = parameter.numel() // parameter.shape[0]
                parameter.copy_(noise / sqrt(fan))


def randn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(high: int, *shape: int, seed: int = 5) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def program(
    mesh: DeviceMesh,
    dtype: torch.dtype,
    parallel: nn.Module,
    single: nn.Module,
    batch: Any,
    *,
    storage: Mapping[str, Storage] | None = None,
    cast: bool = True,
    names: Mapping[str, str] | None = None,
    axis: str = "tp",
    **given: Any,
) -> Program:
    """A program of two models: `single` gets random values, `parallel` its parts of them, both the precision.

    storage: of parameters of which the model's own modules do not say it.
    axis: of the mesh, over which parameters are sharded.
    cast: whether both models are cast to the precision; else they hold what they are built with.
    """
    fill(single)
    if cast:
        single.to(dtype)
        parallel.to(dtype)
    tp = Group(mesh, axis)
    known = {**storages(parallel), **(storage or {})}
    names = names or {}

    def load(source: nn.Module) -> None:
        values = dict(source.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, parameter in parallel.named_parameters():
                parameter.copy_(part(values[names.get(name, name)].to(parameter.dtype), known.get(name), tp))

    load(single)
    return Program(
        parallel, single, mapped(batch, lambda _, tensor: tensor.to(dtype)), mesh, load,
        lambda name: 1.0 if known.get(name) is not None else 1 / tp.size,
        names=names, **given,
    )  # fmt: skip


class Column(Stored):
    """Y = XWᵀ + b, W [m/tp, d]; dX is summed. `sp`: rows of X are sharded, and gathered."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tp: Group, d: int, m: int, bias: bool = True, sp: bool = False, how: Storage = 0) -> None:
        super().__init__()
        given: dict[str, Any] = {"weight": ((m, d), how)} | ({"bias": ((m,), how)} if bias else {})
        self.hold(tp, **given)
        self.biased = bias
        self.enter = tp.gather_rows if sp else tp.copy

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.enter(x), self.weight, self.bias if self.biased else None)


class Row(Stored):
    """Y = XWᵀ + b, W [d, m/tp]; Y is summed, and b added once. `sp`: rows of Y are sharded."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tp: Group, m: int, d: int, bias: bool = True, sp: bool = False) -> None:
        super().__init__()
        given: dict[str, Any] = {"weight": ((d, m), 1)} | ({"bias": ((d,), None)} if bias else {})
        self.hold(tp, **given)
        self.biased = bias
        self.leave = tp.scatter_rows if sp else tp.reduce
        self.share = tp.copy if sp else tp.same

    def forward(self, x: Tensor) -> Tensor:
        y = self.leave(nn.functional.linear(x, self.weight))
        return y + self.share(self.bias) if self.biased else y


def column(tp: Group | None, d: int, m: int, bias: bool = True, sp: bool = False, how: Storage = 0) -> nn.Module:
    """Of one device (tp None) the plain layer."""
    return nn.Linear(d, m, bias=bias) if tp is None else Column(tp, d, m, bias, sp, how)


def row(tp: Group | None, m: int, d: int, bias: bool = True, sp: bool = False) -> nn.Module:
    return nn.Linear(m, d, bias=bias) if tp is None else Row(tp, m, d, bias, sp)


Build = Callable[[Group | None], nn.Module]


def both(build: Build, batch: Any, **given: Any) -> Callable[[DeviceMesh, torch.dtype], Program]:
    """A program of one builder, which is given the group, or None for one device."""

    def make(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
        return program(mesh, dtype, build(Group(mesh)), build(None), batch, **given)

    return make


def over_dp(
    build: Build,
    rows: int,
    loss: Callable[..., Tensor],
    *,
    term: Callable[..., Tensor] | None = None,
    splits: Mapping[str, str] = TERM,
) -> Callable[[DeviceMesh, torch.dtype], Program]:
    """A program of replicas, each with its own rows; gradients are summed as they arrive.

    term: what a rank differentiates, `term(dp, model, x)`; by default its own loss. splits: that it is its term.
    """

    def make(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
        mesh = called(mesh, "dp")
        dp, single, x = Group(mesh, "dp"), build(None), randn(rows, 10)
        parallel = build(dp)
        for parameter in parallel.parameters():
            parameter.register_hook(dp.sum)
        return program(
            mesh, dtype, parallel, single, [x], axis="dp", loss=loss, splits=splits,
            parallel_loss=term and partial(term, dp), parallel_batch=[part(x, 0, dp).to(dtype)],
        )  # fmt: skip

    return make


def mean_square(model: nn.Module, *batch: Any) -> Tensor:
    """A loss that no scale of the output leaves without gradients."""
    return model(*batch).float().square().mean()


def called(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The same ranks, the axis called otherwise."""
    return DeviceMesh.from_group(mesh.get_group("tp"), "cpu", mesh_dim_names=(name,))


def ranks(mesh: DeviceMesh) -> tuple[int, int]:
    """How many there are, and which one this is."""
    return dist.get_world_size(mesh.get_group("tp")), dist.get_rank(mesh.get_group("tp"))
