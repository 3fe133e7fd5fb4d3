"""Linear–GELU–Linear, tensor parallel, as each library has its users write it. No bias; weights `[out, in]`.

Every contender computes the same sums: X[n,d] W[m/tp,d] -> H[n,m/tp], then H[n,m/tp] W[d,m/tp] -> Y[n,d].
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg


class _Block(nn.Module):
    """up, GELU, down."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def local(d: int, m: int, dtype: torch.dtype, mesh: DeviceMesh) -> nn.Module:
    """What one rank computes, and nothing else: two plain nn.Linear of the local sizes."""
    part = m // mesh.size()
    return _Block(nn.Linear(d, part, bias=False, dtype=dtype), nn.Linear(part, d, bias=False, dtype=dtype))


class _HandColumn(torch.autograd.Function):
    """X[n,d] W[m/tp,d] -> Y[n,m/tp]; dX is summed over tp while dW is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.group = group
        return F.linear(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        dx = dy.mm(w)
        work = dist.all_reduce(dx, group=ctx.group, async_op=True)
        dw = dy.t().mm(x)
        work.wait()
        return dx, dw, None


class _HandRow(torch.autograd.Function):
    """X[n,d/tp] W[m,d/tp] -> Y[n,m], summed over tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, w)
        y = F.linear(x, w)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        return dy.mm(w), dy.t().mm(x), None


class _HandLinear(nn.Module):
    def __init__(
        self, function: type[torch.autograd.Function], rows: int, columns: int, dtype: torch.dtype, group: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns, dtype=dtype) / columns**0.5)
        self.function, self.group = function, group

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.weight, self.group)


def hand(d: int, m: int, dtype: torch.dtype, mesh: DeviceMesh) -> nn.Module:
    """A pair of autograd Functions for this one case, dX's all-reduce under dW's product."""
    part, group = m // mesh.size(), mesh.get_group()
    return _Block(_HandLinear(_HandColumn, part, d, dtype, group), _HandLinear(_HandRow, d, part, dtype, group))


def ours(d: int, m: int, dtype: torch.dtype, mesh: DeviceMesh) -> nn.Module:
    return _Block(
        sg.ColumnParallelLinear(d, m, bias=False, mesh=mesh, dtype=dtype),
        sg.RowParallelLinear(m, d, bias=False, mesh=mesh, dtype=dtype),
    )


def dtensor(d: int, m: int, dtype: torch.dtype, mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    block = _Block(nn.Linear(d, m, bias=False, dtype=dtype), nn.Linear(m, d, bias=False, dtype=dtype))
    return parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


class _FairscaleBlock(_Block):
    """fairscale's layers read their group from a global variable, at every call: it is set to the block's own before
    each, so that blocks on several groups can live in one process (some tens of nanoseconds a call)."""

    state: Any
    group: Any

    def forward(self, x: Tensor) -> Tensor:
        self.state._MODEL_PARALLEL_GROUP = self.group
        return super().forward(x)


def fairscale(d: int, m: int, dtype: torch.dtype, mesh: DeviceMesh) -> nn.Module:
    state: Any = import_module("fairscale.nn.model_parallel.initialize")
    layers = import_module("fairscale.nn.model_parallel.layers")
    state._MODEL_PARALLEL_GROUP = mesh.get_group()
    block = _FairscaleBlock(
        layers.ColumnParallelLinear(d, m, bias=False, gather_output=False),
        layers.RowParallelLinear(m, d, bias=False, input_is_parallel=True),
    )
    block.state, block.group = state, mesh.get_group()
    return block.to(dtype)


class _First(nn.Module):
    """The first of what a module returns: Megatron's layers return (Y, bias)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


def megatron(d: int, m: int, dtype: torch.dtype, mesh: DeviceMesh) -> nn.Module:
    """Megatron-core's layers on the group that they are given; its parallel_state, which they also read sizes from, is
    initialised once a process, on groups of the default backend that nothing is sent over."""
    with contextlib.redirect_stderr(io.StringIO()):
        state = import_module("megatron.core.parallel_state")
        layers = import_module("megatron.core.tensor_parallel.layers")
        config_type = import_module("megatron.core.model_parallel_config").ModelParallelConfig
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel(mesh.size(), create_gloo_process_groups=False)
    config = config_type(
        tensor_model_parallel_size=mesh.size(),
        params_dtype=dtype,
        use_cpu_initialization=mesh.device_type == "cpu",
        gradient_accumulation_fusion=False,
    )
    options = {"config": config, "init_method": nn.init.xavier_normal_, "bias": False, "skip_bias_add": False}
    options["tp_group"] = mesh.get_group()
    return _Block(
        _First(layers.ColumnParallelLinear(d, m, gather_output=False, **options)),
        _First(layers.RowParallelLinear(m, d, input_is_parallel=True, **options)),
    )


@dataclass(frozen=True, slots=True)
class Peer:
    """A contender: its name, how its block is made of (d, m, dtype, mesh), and the module it cannot do without.

    communicates: whether its block communicates, and so differs between backends.
    lazy: whether results may still be under way when they are returned, as tensors that know how to `wait`.
    """

    name: str
    make: Callable[[int, int, torch.dtype, DeviceMesh], nn.Module]
    needs: str = "torch"
    install: str = ""
    communicates: bool = True
    lazy: bool = False


OURS, HAND, LOCAL = "shardgrad", "hand-written", "local products"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(LOCAL, local, communicates=False),
        Peer(HAND, hand),
        Peer(OURS, ours),
        Peer("DTensor", dtensor, lazy=True),
        Peer("fairscale", fairscale, "fairscale", "pip install --no-deps fairscale==0.4.13"),
        Peer("Megatron-core", megatron, "megatron.core", "pip install --no-deps megatron-core"),
    )
}


def missing(name: str) -> str | None:
    """Why a contender cannot take part, and what to do about it; None if it can be imported."""
    peer = PEERS[name]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            import_module(peer.needs)
    except ImportError as error:
        return f"{name} is left out: {error} ({peer.install})"
    return None


def step_of(name: str, d: int, m: int, dtype: torch.dtype, mesh: DeviceMesh, tokens: int) -> Callable[[], None]:
    """One forward and backward of a contender's block, made here: Y, dX and dW are there when it returns.

    Gradients are let go of first, as by optimizer.zero_grad().
    """
    torch.manual_seed(0)
    x = torch.randn(tokens, d, dtype=dtype).requires_grad_()
    dy = torch.randn(tokens, d, dtype=dtype)
    block = PEERS[name].make(d, m, dtype, mesh)
    leaves = [x, *block.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        block(x).backward(dy)

    def lazy_step() -> None:
        for leaf in leaves:
            leaf.grad = None
        y = block(x)
        y.backward(dy)
        arrive(y, x.grad)

    return lazy_step if PEERS[name].lazy else step


def arrive(*tensors: Any) -> None:
    """Wait for those that are still under way: DTensor's functional collectives return such."""
    for tensor in tensors:
        if hasattr(tensor, "wait"):
            tensor.wait()


def forget_groups() -> None:
    """Empty the global variables in which peers keep groups, before those are destroyed."""
    if "fairscale.nn.model_parallel.initialize" in sys.modules:
        sys.modules["fairscale.nn.model_parallel.initialize"].destroy_model_parallel()
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()


def warnings_off() -> None:
    """Peers warn of deprecated names at every call; the text would be timed with them."""
    warnings.filterwarnings("ignore")
