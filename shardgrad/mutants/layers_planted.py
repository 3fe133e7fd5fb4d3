"""Bugs planted into layers of shardgrad, of DTensor, of Megatron-core and of fairscale, by patching what they call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardgrad.comm import collectives as raw
from shardgrad.comm.mesh import view
from shardgrad.mutants import released_planted
from shardgrad.mutants.mutant import MADE_UP, Mutant, Program, on_gradient
from shardgrad.nn.linear import ColumnParallelLinear, RowParallelLinear

D, M, ROWS = 10, 24, 7
SHARDGRAD, DTENSOR, MEGATRON, FAIRSCALE, DP = "shardgrad", "DTensor", "Megatron-core", "fairscale", "data parallel"
_RETURN = "`all_reduce(x.contiguous()); return x`, found in three published frameworks"


class _FeedForward(nn.Module):
    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(D), up, nn.GELU(), down

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x))
        y = self.down(self.act(h[0] if isinstance(h, tuple) else h))  # Megatron-core returns (output, bias)
        return y[0] if isinstance(y, tuple) else y


def _single() -> _FeedForward:
    torch.manual_seed(3)
    return _FeedForward(nn.Linear(D, M), nn.Linear(M, D))


_CUT = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.roll(1, 0).detach()).square().mean()


def _program(parallel: nn.Module, mesh: DeviceMesh) -> Program:
    single, ranks, own = _single(), mesh.size(), mesh.get_local_rank()

    def load(source: nn.Module) -> None:
        values = dict(source.named_parameters())
        with torch.no_grad():
            for name, parameter in parallel.named_parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                value = values[name]
                local.copy_(value.chunk(ranks, _CUT[name])[own] if name in _CUT else value)

    load(single)
    x = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(5))
    return Program(parallel, single, [x], mesh, load, lambda name: 1.0 if name in _CUT else 1 / ranks, loss=_loss)


def shardgrad(mesh: DeviceMesh) -> Program:
    return _program(_FeedForward(ColumnParallelLinear(D, M, mesh=mesh), RowParallelLinear(M, D, mesh=mesh)), mesh)


def dtensor(mesh: DeviceMesh) -> Program:
    model = _FeedForward(nn.Linear(D, M), nn.Linear(M, D))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return _program(model, mesh)


@contextmanager
def _megatron_state(ranks: int) -> Iterator[None]:
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(ranks)
    yield


def megatron(mesh: DeviceMesh) -> Program:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import layers

    with _megatron_state(mesh.size()):
        config = ModelParallelConfig(tensor_model_parallel_size=mesh.size(), use_cpu_initialization=True)
        given: dict[str, Any] = {"config": config, "init_method": nn.init.xavier_normal_, "bias": True}
        up = layers.ColumnParallelLinear(D, M, gather_output=False, **given)
        down = layers.RowParallelLinear(M, D, input_is_parallel=True, skip_bias_add=False, **given)
    return _program(_FeedForward(up, down), mesh)


def fairscale(mesh: DeviceMesh) -> Program:
    from fairscale.nn.model_parallel import initialize as state
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear

    if not state.model_parallel_is_initialized():
        with redirect_stdout(StringIO()):  # it prints
            state.initialize_model_parallel(mesh.size())
    up = ColumnParallelLinear(D, M, gather_output=False)
    return _program(_FeedForward(up, RowParallelLinear(M, D, input_is_parallel=True)), mesh)


def data_parallel(mesh: DeviceMesh) -> Program:
    """Rows are sharded; every rank's loss is its term of the mean, and gradients are summed as they arrive."""
    torch.manual_seed(3)
    parallel = nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Linear(M, 1))
    single = nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Linear(M, 1))
    axis = view(mesh).axis("tp")
    x = torch.randn(2 * axis.size, D, generator=torch.Generator().manual_seed(5))

    def total(tensor: Tensor) -> Tensor:
        return raw.AllReduce(axis)(tensor.contiguous().clone())

    reduce: dict[str, Callable[[Tensor], Tensor]] = {name: total for name, _ in parallel.named_parameters()}
    for name, parameter in parallel.named_parameters():
        parameter.register_hook(lambda g, name=name: reduce[name](g))

    def load(source: nn.Module) -> None:
        parallel.load_state_dict(source.state_dict())

    def whole(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 1).square().mean()

    def term(model: nn.Module, x: Tensor) -> Tensor:
        own = whole(model, x) / axis.size
        return own + (total(own.detach()) - own.detach())  # the whole loss, of which this rank differentiates its term

    load(single)
    return Program(
        parallel, single, [x], mesh, load, lambda name: 1 / axis.size, loss=whole, parallel_loss=term,
        parallel_batch=[x.chunk(axis.size)[axis.index]], reduce=reduce,
    )  # fmt: skip


PROGRAMS: dict[str, Callable[[DeviceMesh], Program]] = {
    SHARDGRAD: shardgrad,
    DTENSOR: dtensor,
    DP: data_parallel,
    released_planted.WORDS: released_planted.words,
    **({MEGATRON: megatron} if find_spec("megatron") else {}),
    **({FAIRSCALE: fairscale} if find_spec("fairscale") else {}),
}


def _patched(target: Any, name: str, change: Callable[[Any], Any]) -> Callable[[Program], None]:
    def plant(program: Program) -> None:
        program.around = lambda: patch.object(target, name, change(getattr(target, name)))

    return plant


def _patched_path(path: str, change: Callable[[Any], Any]) -> Callable[[Program], None]:
    return lambda program: _patched(import_module(path), "_reduce", change)(program)


def _returns_its_input(start: Any) -> Any:
    return lambda self, x, tensors, options: start(self, x, [x.clone()], options)  # the sum is in the copy


def _hooked(name: str, change: Callable[[Tensor, Program], Tensor]) -> Callable[[Program], None]:
    return lambda program: on_gradient(program.parallel, name, lambda g: change(g, program))


def _not_summed(program: Program) -> None:
    program.reduce["0.bias"] = lambda gradient: gradient


def _averaged(program: Program) -> None:
    for name, total in list(program.reduce.items()):
        program.reduce[name] = partial(_mean, total, program.mesh.size())


def _mean(total: Callable[[Tensor], Tensor], ranks: int, gradient: Tensor) -> Tensor:
    return total(gradient) / ranks


def _of_the_next_rank(gradient: Tensor, program: Program) -> Tensor:
    axis = view(program.mesh).axis("tp")
    return raw.AllGather(axis, 0, M)(gradient).chunk(axis.size)[(axis.index + 1) % axis.size]


def _identity(_: Any) -> Any:
    return lambda *args, **kwargs: next(one for one in args if isinstance(one, Tensor))


def _twice(collective: Any) -> Any:
    def again(*args: Any, **kwargs: Any) -> Any:
        once = collective(*args, **kwargs).clone()
        return collective(*[once if isinstance(one, Tensor) else one for one in args], **kwargs)

    return again


MUTANTS = [
    Mutant(
        "all-reduce returns its input",
        SHARDGRAD,
        _patched(raw.AllReduce, "_begin", _returns_its_input),
        _RETURN,
        "sum over tp missing",
    ),
    Mutant(
        "the row layer's bias gradient is summed",
        SHARDGRAD,
        _hooked("down.bias", lambda g, p: g * p.mesh.size()),
        "torchtitan #4245",
        "bias counted by every rank of tp",
    ),
    Mutant("the next rank's gradient", SHARDGRAD, _hooked("up.weight", _of_the_next_rank), MADE_UP, "shards permuted"),
    Mutant(
        "a DTensor's gradient has the wrong sign",
        DTENSOR,
        _hooked("up.weight", lambda g, p: -g),
        MADE_UP,
        "sign flipped",
    ),
    Mutant(
        "a DTensor's gradient is divided by the ranks",
        DTENSOR,
        _hooked("down.bias", lambda g, p: g / p.mesh.size()),
        "torchtitan #4332",
        "bias divided by the ranks of tp",
    ),
    Mutant("one bias's gradient is not summed", DP, _not_summed, "bigcode Megatron-LM #11 asks", "sum over tp missing"),
    Mutant(
        "gradients are averaged, not summed",
        DP,
        _averaged,
        "compare torchtune #2240",
        "mean over tp where a sum belongs",
    ),
    Mutant(
        "Megatron-core's reduction does nothing",
        MEGATRON,
        _patched_path("megatron.core.tensor_parallel.mappings", _identity),
        MADE_UP,
        "sum over tp missing",
    ),
    Mutant(
        "fairscale's reduction does nothing",
        FAIRSCALE,
        _patched_path("fairscale.nn.model_parallel.mappings", _identity),
        MADE_UP,
        "sum over tp missing",
    ),
    Mutant(
        "fairscale reduces twice",
        FAIRSCALE,
        _patched_path("fairscale.nn.model_parallel.mappings", _twice),
        MADE_UP,
        "summed twice over tp",
    ),
    *released_planted.MUTANTS,
]
