"""Second derivatives, torch.func and forward mode of all that shardgrad has: on two ranks as on one, or an error that
says of what."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd.functional import hvp, jvp, vhp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

import shardgrad as sg
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import axis_on
from shardgrad.layout.sizes import chunk
from shardgrad.testing import distributed

# torch's own, as it loads what forward mode needs, and for what it has no rule of many entries.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]
D = torch.float64
Kind = dict[str, Any]
Call = Callable[[Tensor], Tensor]
Make = Callable[[DeviceMesh, Kind], Call]


def _layer(name: str, *args: Any, **more: Any) -> Make:
    def make(mesh: DeviceMesh, kind: Kind) -> Call:
        layer: Call = getattr(sg, name)(*args, **more, **kind)
        return layer

    return make


def _gathered(name: str, dim: int, *args: Any, **more: Any) -> Make:
    """A layer that shards the output of replicated x."""

    def make(mesh: DeviceMesh, kind: Kind) -> Call:
        layer = getattr(sg, name)(*args, **more, **kind)
        return nn.Sequential(layer, _Gather(mesh, dim))

    return make


class _Gather(nn.Module):
    def __init__(self, mesh: DeviceMesh, dim: int) -> None:
        super().__init__()
        self.mesh, self.dim = mesh, dim

    def forward(self, x: Tensor) -> Tensor:
        return sg.gather_replicated(x, self.mesh, "tp", self.dim)


def _sequence(name: str, *args: Any) -> Make:
    """A layer over rows that the axis shards."""
    return lambda mesh, kind: _Around(getattr(sg, name)(*args, sequence_dim=0, **kind), mesh, 0)


class _Around(nn.Module):
    def __init__(self, layer: nn.Module, mesh: DeviceMesh, dim: int) -> None:
        super().__init__()
        self.layer, self.mesh, self.dim = layer, mesh, dim

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(sg.slice_replicated(x, self.mesh, "tp", self.dim))
        return sg.gather_replicated(y, self.mesh, "tp", self.dim, size=x.shape[self.dim])


def _loss(mesh: DeviceMesh, kind: Kind) -> Call:
    target = torch.tensor([1, 5, -100, 3])

    def call(x: Tensor) -> Tensor:
        logits = sg.slice_replicated(x, mesh, "tp", 1)
        return sg.vocab_parallel_cross_entropy(logits, target, vocab_size=6, mesh=mesh, label_smoothing=0.1)

    return call


def _statistics(mesh: DeviceMesh, kind: Kind) -> Call:
    tokens = torch.tensor([[1, 5], [5, 0], [-100, 2], [3, 3]])

    def call(x: Tensor) -> Tensor:
        part = sg.slice_replicated(x, mesh, "tp", 1)
        p, q = (
            sg.VocabParallelLogits(z, vocab_size=6, mesh=mesh, temperature=0.8, soft_cap=cap)
            for z, cap in ((part, 4.0), (part.cos(), None))
        )
        found = p.statistics(tokens, logsumexp=True, entropy=True, mean_log_prob=True, kl=q)
        some = [value for value in found if value is not None]
        shared = sg.gather_replicated(p.log_softmax().square(), mesh, "tp", 1, size=6)
        return torch.cat([some[0], torch.stack(some[1:], -1), p.topk(3).values, shared], -1)

    return call


def _embedding(mesh: DeviceMesh, kind: Kind) -> Call:
    table = sg.VocabParallelEmbedding(9, 6, **kind)
    ids = torch.tensor([8, 2, 0, 5])
    return lambda x: _Gather(mesh, 1)(table.logits(x * table(ids)))


def _block(mesh: DeviceMesh, kind: Kind) -> Call:
    parts = sg.Attention(6, 3, **kind, reduce=False), sg.SwiGLU(6, 5, **kind, reduce=False)
    block = sg.ParallelBlock(sg.RMSNorm(6, **kind), *parts)
    return lambda x: block(x.unsqueeze(0))[0]


def _matmul(mesh: DeviceMesh, kind: Kind) -> Call:
    start, length = chunk(7, mesh.size(), mesh.get_local_rank())
    w = torch.randn(6, 7, generator=torch.Generator().manual_seed(5), dtype=D)[:, start : start + length]
    return lambda x: _Gather(mesh, 1)(sg.matmul(x, w, sg.PRESETS["column"], mesh))


def _convolve(mesh: DeviceMesh, kind: Kind) -> Call:
    start, length = chunk(5, mesh.size(), mesh.get_local_rank())
    w = torch.randn(5, 1, 3, generator=torch.Generator().manual_seed(5), dtype=D)[start : start + length]
    layout = "X[b,c,h] W[o/tp,c,i] -> Y[b,o/tp,p]"
    return lambda x: _Gather(mesh, 1)(sg.convolve(x.unsqueeze(1), w, layout, mesh, padding=1))


def _collective(name: str) -> Make:
    """What is x again, or a multiple of it."""

    def make(mesh: DeviceMesh, kind: Kind) -> Call:
        ranks = mesh.size()
        part = lambda x: sg.slice_replicated(x, mesh, "tp", 0)  # noqa: E731
        whole = lambda x: sg.gather_replicated(x, mesh, "tp", 0)  # noqa: E731
        term = lambda x: sg.replicate(x, mesh) / ranks  # noqa: E731
        rows = [4 // ranks**2] * ranks
        ways: dict[str, Call] = {
            "all_reduce": lambda x: sg.all_reduce(term(x), mesh),
            "replicate": lambda x: sg.all_reduce(term(x.square()), mesh),
            "reduce_scatter": lambda x: whole(sg.reduce_scatter(term(x), mesh)),
            "all_gather": lambda x: sg.all_reduce(sg.all_gather(part(x), mesh) / ranks, mesh),
            "gather_replicated": lambda x: whole(part(x)),
            "slice_replicated": lambda x: whole(part(x)),
            "all_to_all": lambda x: sg.gather_replicated(
                sg.all_to_all(part(x), mesh, split_dim=1, concat_dim=0), mesh, "tp", 1
            ),
            "all_to_all_rows": lambda x: (
                whole(sg.all_to_all_rows(part(x), mesh, send=rows, receive=rows)).square().sum(0)
            ),
        }
        return ways[name]

    return make


def _dropout(mesh: DeviceMesh, kind: Kind) -> Call:
    layer = sg.Dropout(0.3, "X[n,d]", mesh=mesh)

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return layer(x).sin()

    return call


def _positions(mesh: DeviceMesh, kind: Kind) -> Call:
    layer = sg.LearnedPositions(4, 6, **kind)
    return lambda x: layer(4) * x


EVERYTHING: dict[str, Make] = {
    "matmul": _matmul,
    "convolve": _convolve,
    "vocab_parallel_cross_entropy": _loss,
    "VocabParallelLogits": _statistics,
    "Attention": lambda mesh, kind: (lambda layer: lambda x: layer(x.unsqueeze(0))[0])(sg.Attention(6, 3, **kind)),
    "ColumnParallelLinear": _layer("ColumnParallelLinear", 6, 7, gather_output=True),
    "Conv1d": lambda mesh, kind: (lambda f: lambda x: f(x.unsqueeze(1)))(_gathered("Conv1d", 1, 1, 5, 3)(mesh, kind)),
    "Conv2d": lambda mesh, kind: (lambda f: lambda x: f(x[None, None]))(_gathered("Conv2d", 1, 1, 5, 3)(mesh, kind)),
    "Dropout": _dropout,
    "GroupNorm": lambda mesh, kind: _Around(sg.GroupNorm(3, 6, **kind), mesh, 1),
    "LayerNorm": _sequence("LayerNorm", 6),
    "LearnedPositions": _positions,
    "Linear": _gathered("Linear", 1, 6, 7, layout="X[n,d] W[m/tp,d] -> Y[n,m/tp]"),
    "MLP": _layer("MLP", 6, 7),
    "MoE": lambda mesh, kind: (lambda layer: lambda x: layer(x)[0])(sg.MoE(6, 5, 4, axis="tp", **kind)),
    "ParallelBlock": _block,
    "RMSNorm": _sequence("RMSNorm", 6),
    "Rotary": lambda mesh, kind: lambda x: sg.Rotary(2)(x.view(1, 4, 3, 2), torch.arange(4)),
    "RowParallelLinear": _layer("RowParallelLinear", 6, 7, input_is_parallel=False),
    "SwiGLU": _layer("SwiGLU", 6, 7),
    "VocabParallelEmbedding": _embedding,
    **{name: _collective(name) for name in (
        "all_gather", "all_reduce", "all_to_all", "all_to_all_rows", "gather_replicated", "reduce_scatter",
        "replicate", "slice_replicated",
    )},
}  # fmt: skip
REFUSED = {("MoE", "vmap"): "MoE, whose shapes depend on which experts the tokens choose,"}


def ways(call: Call, x: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    def loss(x: Tensor) -> Tensor:
        return call(x).sin().sum()

    def of_weights() -> Tensor:
        weights = [p for p in call.parameters() if p.requires_grad] if isinstance(call, nn.Module) else []
        leaf = x.clone().requires_grad_()
        grads = torch.autograd.grad(loss(leaf), [leaf, *weights], create_graph=True)
        return torch.autograd.grad(grads[0].square().sum(), leaf)[0]

    return {
        "hvp": lambda: hvp(loss, x, v)[1],
        "twice": of_weights,
        "grad": lambda: func.grad(loss)(x),
        "vmap": lambda: func.vmap(func.grad(loss), randomness="same")(torch.stack([x, v])),
    }


def more_ways(call: Call, x: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    def loss(x: Tensor) -> Tensor:
        return call(x).sin().sum()

    return {
        "vhp": lambda: vhp(loss, x, v)[1],
        "jvp": lambda: jvp(call, x, v)[1],
        "grad of grad": lambda: func.grad(lambda x: func.grad(loss)(x).square().sum())(x),
        "func.jvp": lambda: func.jvp(call, (x,), (v,))[1],
        "forward over reverse": lambda: func.jvp(func.grad(loss), (x,), (v,))[1],
    }


def _compare(name: str, which: Any) -> Call:
    two = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    one = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "tp"))["tp"]
    x, v = (torch.randn(4, 6, generator=torch.Generator().manual_seed(n), dtype=D) for n in (1, 2))
    made = []
    for mesh in (one, two):
        torch.manual_seed(3)
        made.append(EVERYTHING[name](mesh, {"mesh": mesh, "dtype": D}))
    with sdpa_kernel(SDPBackend.MATH):
        right, found = (which(call, x, v) for call in made)
        for way in right:
            if (name, way) in REFUSED:
                with pytest.raises(RuntimeError, match=REFUSED[name, way]):
                    found[way]()
            else:
                torch.testing.assert_close(found[way](), right[way](), rtol=1e-10, atol=1e-12, msg=f"{name}: {way}")
                assert bool(right[way]().abs().max() > 0), way
    return made[1]


def _check_weights(call: nn.Module, x: Tensor) -> None:
    """Each rank's gradients by torch.func are those of backward."""
    weights = {name: p.detach() for name, p in call.named_parameters()}
    found = func.grad(lambda weights: func.functional_call(call, weights, (x,)).sin().sum())(weights)
    right = torch.autograd.grad(call(x).sin().sum(), list(call.parameters()))
    torch.testing.assert_close(list(found.values()), list(right), rtol=1e-10, atol=1e-12)


@distributed(world_size=2)
def test_a_bare_collective_is_refused(world_size: int) -> None:
    over = axis_on(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), "tp")
    with pytest.raises(RuntimeError, match=r"all-reduce over tp was reached inside torch\.func"):
        func.grad(lambda x: AllReduce(over)(x.clone()).sum())(torch.ones(3))


def test_everything_is_here() -> None:
    differentiable = {
        name for name in dir(sg) if inspect.isclass(value := getattr(sg, name)) and issubclass(value, nn.Module)
    }
    assert differentiable <= set(EVERYTHING)
    from shardgrad.comm import adjoint

    assert set(adjoint._PAIRS) - {"nothing"} <= set(EVERYTHING)


@distributed(world_size=2)
@pytest.mark.parametrize("name", EVERYTHING)
def test_second_derivatives_and_torch_func(world_size: int, name: str) -> None:
    call = _compare(name, ways)
    if isinstance(call, nn.Module):
        _check_weights(call, torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=D))


@pytest.mark.slow
@distributed(world_size=2)
@pytest.mark.parametrize("name", EVERYTHING)
def test_more_of_them_and_forward_mode(world_size: int, name: str) -> None:
    _compare(name, more_ways)
