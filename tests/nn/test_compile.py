"""Layers and whole models under torch.compile, in one graph, against themselves without it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from exact import integers
from plain import randn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.errors import MeshError, ShapeError
from shardgrad.layout.sizes import chunk
from shardgrad.testing import distributed
from shardgrad.train.model import GPT

D = torch.float64
S = 7


def tp(world_size: int) -> DeviceMesh:
    torch.compiler.reset()
    # torch's own, as it compiles: of modules it deprecates itself and settings that matter on other machines.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", UserWarning)
    torch.manual_seed(5)
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))


def run(call: Callable[..., Tensor], inputs: list[Tensor], parameters: list[Tensor]) -> Iterator[Tensor | None]:
    """What a call gives, and the gradients of all for a random dY."""
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    for parameter in parameters:
        parameter.grad = None
    y = call(*inputs)
    y.backward(randn(*y.shape, seed=9) if y.dim() else torch.tensor(1.5, dtype=y.dtype))
    yield y.detach()
    for tensor in [*(x for x in inputs if x.is_floating_point()), *parameters]:
        yield tensor.grad


def assert_same(call: Callable[..., Tensor], inputs: list[Tensor], module: nn.Module, backend: str) -> None:
    parameters = list(module.parameters())
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    list(run(call, inputs, parameters))  # compares layouts between the ranks
    with sg.trace_collectives() as plain:
        expected = list(run(call, inputs, parameters))
    list(run(compiled, inputs, parameters))
    with sg.trace_collectives() as traced:
        found = list(run(compiled, inputs, parameters))
    assert len(found) == len(expected) > 1
    for one, right in zip(found, expected):
        assert (one is None) == (right is None)
        if one is not None and right is not None:
            assert one.shape == right.shape
            torch.testing.assert_close(one, right, rtol=1e-11, atol=1e-11 * (1 + float(right.abs().sum())) / 100)
    assert sorted((e.operation, e.axis, e.bytes) for e in traced) == sorted(
        (e.operation, e.axis, e.bytes) for e in plain
    )


def part(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    start, length = chunk(x.shape[dim], mesh.size(), mesh.get_local_rank())
    return x.narrow(dim, start, length).contiguous()


@distributed(world_size=[1, 2, 3], timeout=200)
def test_layers(world_size: int) -> None:
    mesh = tp(world_size)
    kind: dict[str, Any] = {"mesh": mesh, "dtype": D}
    x, wide = randn(2, S, 12, seed=1), randn(2, S, 10, seed=2)
    both = nn.ModuleList([sg.ColumnParallelLinear(12, 10, gather_output=True, **kind), sg.LayerNorm(10, **kind)])
    assert_same(lambda x: both[1](both[0](x)), [x], both, "aot_eager")
    row = sg.RowParallelLinear(12, 5, input_is_parallel=False, **kind)
    assert_same(row, [x], row, "aot_eager")
    kept = nn.ModuleList(
        [
            sg.RMSNorm(12, sequence_dim=1, **kind),
            sg.ColumnParallelLinear(12, 10, sequence_dim=1, save_gathered=("X",), **kind),
            sg.RowParallelLinear(10, 6, sequence_dim=1, **kind),
        ]
    )
    assert_same(lambda x: kept[2](kept[1](kept[0](x), S)), [part(x, mesh)], kept, "aot_eager")
    free = sg.ColumnParallelLinear(10, 9, **kind)
    free.weight.requires_grad_(False)
    assert_same(free, [wide], free, "aot_eager")


@pytest.mark.slow
@distributed(world_size=3, timeout=200)
def test_a_parallel_block_of_shared_heads(world_size: int) -> None:
    mesh = tp(world_size)
    kind: dict[str, Any] = {"mesh": mesh, "dtype": D, "reduce": False}
    norm = sg.LayerNorm(12, mesh=mesh, dtype=D)
    attention = sg.Attention(12, 6, num_kv_heads=2, rotary=sg.Rotary(2), **kind)
    block = sg.ParallelBlock(norm, attention, sg.SwiGLU(12, 11, **kind))
    assert_same(block, [randn(2, S, 12, seed=1)], block, "aot_eager")


@distributed(world_size=[1, 2, 3], timeout=200)
def test_a_whole_model_and_its_loss(world_size: int) -> None:
    model = GPT(layers=1, heads=3, d_model=12, seq_len=S, vocab=11, tied=True, mesh=tp(world_size), dtype=D)
    ids, targets = (torch.randint(0, 11, (2, S), generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    assert_same(model.loss, [ids, targets], model, "aot_eager")
    if world_size == 2:  # another shape
        assert_same(model.loss, [ids[:, :5].clone(), targets[:, :5].clone()], model, "aot_eager")


@pytest.mark.slow  # a C++ compiler, on every rank
@distributed(world_size=2, timeout=200)
def test_inductor(world_size: int) -> None:
    mesh = tp(world_size)
    norm = sg.LayerNorm(6, mesh=mesh, sequence_dim=1, dtype=D)
    layer = sg.MLP(6, 9, mesh=mesh, sequence_dim=1, dtype=D)
    both = nn.ModuleList([norm, layer])
    assert_same(lambda x: x + layer(norm(x), S), [part(randn(2, S, 6, seed=1), mesh)], both, "inductor")


LAYOUTS = (
    "X[n,d] W[d,m/tp] -> Y[n,m/tp] + B[m/tp]",
    "X[n/tp,d] W[d/tp,m] -> Y[n/tp,m]",
    "X[n,d/tp] W[d/tp,m] -> Y[n/tp,m] + B[m]",
)


@distributed(world_size=[2, 3], timeout=200)
def test_products_are_equal_in_integers(world_size: int) -> None:
    mesh, sizes = tp(world_size), {"n": 5, "d": 7, "m": 4}
    for text in LAYOUTS:
        layout = sg.Layout(text)
        tensors = [
            sg.shard(integers(spec, sizes, at), spec, mesh)
            for at, spec in enumerate((layout.lhs, layout.rhs, layout.bias)[: 2 + layout.has_bias])
        ]
        dy = sg.shard(integers(layout.out, sizes, 8), layout.out, mesh)

        def call(x: Tensor, w: Tensor, b: Tensor | None = None, text: str = text) -> Tensor:
            return sg.matmul(x, w, text, mesh, bias=b, sizes=sizes)

        made = []
        for one in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
            inputs = [tensor.clone().requires_grad_() for tensor in tensors]
            y = one(*inputs)
            y.backward(dy)
            made.append([y.detach(), *(x.grad for x in inputs)])
        for eager, compiled in zip(*made):
            assert eager is not None
            assert torch.equal(eager, compiled), text


@distributed(world_size=2)
def test_a_product_that_the_loss_does_not_use(world_size: int) -> None:
    """Of products that share their input: dY of one is missing, and the other's gradients are right all the same."""
    mesh = tp(world_size)
    layouts = "X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]", "X[n/tp,d] V[d,k/tp] -> Z[n,k/tp]"
    x, w, v = part(randn(5, 6, seed=1), mesh, 0), part(randn(6, 4, seed=2), mesh), part(randn(6, 8, seed=3), mesh)

    def call(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return sg.matmul(x, [(w, layouts[0]), (v, layouts[1])], mesh, sizes={"n": 5})[1].square()

    made = [list(run(one, [x, w, v], [])) for one in (call, torch.compile(call, backend="aot_eager", fullgraph=True))]
    for eager, compiled in zip(*made):
        # What autograd leaves None, a graph may give as zeros.
        right = torch.zeros(()) if eager is None else eager
        found = torch.zeros_like(right) if compiled is None else compiled
        torch.testing.assert_close(found, right.expand_as(found).to(found.dtype), rtol=1e-12, atol=1e-12)
    assert made[0][1] is not None


@distributed(world_size=2)
def test_one_graph_is_not_used_for_a_layer_that_communicates_otherwise(world_size: int) -> None:
    torch.compiler.reset()
    tp(world_size)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "one"))
    again = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "one"))
    x = randn(3, 4, seed=1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    for layer in (
        sg.RowParallelLinear(8, 4, mesh=mesh, dtype=D),
        sg.RowParallelLinear(4, 4, mesh=mesh, axis="one", dtype=D),
        sg.RowParallelLinear(8, 4, mesh=mesh, reduce=False, dtype=D),
        sg.RowParallelLinear(8, 4, mesh=again, dtype=D),
        sg.ColumnParallelLinear(4, 8, mesh=mesh, dtype=D),
    ):
        torch.testing.assert_close(call(layer, x), layer(x), rtol=1e-12, atol=1e-12)


@distributed(world_size=2)
def test_what_a_graph_cannot_do_is_refused(world_size: int) -> None:
    mesh = tp(world_size)
    layer = sg.ColumnParallelLinear(4, 6, sequence_dim=1, mesh=mesh, dtype=D)
    x = part(randn(2, 5, 4, seed=1), mesh)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="exchange the size of s"):
        compiled(x)
    y = compiled(x, 5)
    with sg.defer_weight_grads() as later, pytest.raises(RuntimeError, match="cannot be deferred"):
        y.sum().backward()
    assert len(later) == 0
    with sg.check_every_call():
        compiled(x, 5).sum().backward()
    assert layer.weight.grad is not None
    assert ShapeError is not MeshError


@distributed(world_size=2)
def test_main_grads(world_size: int) -> None:
    layer = sg.RowParallelLinear(6, 4, mesh=tp(world_size), dtype=D)
    x = part(randn(5, 6, seed=1), layer.mesh)
    layer(x).square().sum().backward()
    expected = [p.grad for p in layer.parameters()]
    for p in layer.parameters():
        p.grad = None
    sg.use_main_grads(layer.parameters(), D)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for p, right in zip(layer.parameters(), expected):
        assert p.grad is None
        torch.testing.assert_close(p.main_grad, right, rtol=1e-12, atol=1e-12)


@distributed(world_size=[1, 2])
def test_without_gradients(world_size: int) -> None:
    """Inference, frozen layers, and what is saved as gathered for a backward that never comes."""
    mesh = tp(world_size)
    x = randn(3, 6, seed=3)
    for layer in (
        sg.ColumnParallelLinear(6, 4, mesh=mesh, dtype=D),
        sg.SwiGLU(6, 5, mesh=mesh, dtype=D),
        sg.ColumnParallelLinear(6, 4, mesh=mesh, dtype=D, sequence_dim=0, save_gathered=("X",)).requires_grad_(False),
    ):
        size = {"sequence_size": 3 * world_size} if getattr(layer, "save_gathered", ()) else {}
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(x, **size), layer(x, **size))
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            assert torch.equal(compiled(x, **size), layer(x, **size))
