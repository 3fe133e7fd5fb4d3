"""What the base class does for every layer: keywords, tables in docstrings, tensors taken over, few steps."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Unpack

import pytest
import torch
from plain import assert_gradients_match, randn, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.nn.layer import Layer, OneProduct
from shardgrad.nn.parallel import Where
from shardgrad.testing import distributed

D = torch.float64
LAYERS = [layer for name in sg.__all__ if inspect.isclass(layer := getattr(sg, name)) and issubclass(layer, Layer)]
WITH_TABLE = [layer for layer in LAYERS if layer.products]
BUILD: dict[str, Callable[..., tuple[Any, tuple[int, ...]]]] = {
    "ColumnParallelLinear": lambda **where: (sg.ColumnParallelLinear(6, 8, **where), (2, 5, 6)),
    "RowParallelLinear": lambda **where: (sg.RowParallelLinear(6, 8, **where), (2, 5, 6)),
    "SwiGLU": lambda **where: (sg.SwiGLU(6, 8, bias=True, **where), (2, 5, 6)),
    "Attention": lambda **where: (sg.Attention(6, 2, **where), (2, 5)),
    "VocabParallelEmbedding": lambda **where: (sg.VocabParallelEmbedding(8, 6, **where), (2, 5)),
}


def tp(world_size: int) -> DeviceMesh:
    torch.manual_seed(5)
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))


def table(layer: type, column: int) -> Counter[tuple[str, str]]:
    """Phase and collective of every line of a docstring's table, of the column without or with sequence_dim."""
    lines = inspect.getdoc(layer).splitlines()
    first = next(at for at, line in enumerate(lines) if "with sequence_dim:" in line)
    right = lines[first].index("with sequence_dim:")
    found: Counter[tuple[str, str]] = Counter()
    for line in lines[first + 1 :]:
        if not line.strip():
            break
        if "->" not in line:
            phase, left = line[:right].split(maxsplit=1)
            said = line[right:] if column else left
            found.update((phase, one) for one in said.strip().split(", ") if one != "–")
    return found


def test_every_layer_of_products_has_a_table() -> None:
    assert {layer.__name__ for layer in WITH_TABLE} == set(BUILD)
    for layer in WITH_TABLE:
        assert "with sequence_dim:" in inspect.getdoc(layer)
    assert "    dX       all-reduce dX over tp            reduce-scatter dX over tp" in sg.ColumnParallelLinear.__doc__


@distributed(world_size=2)
@pytest.mark.parametrize("sequence_dim", [None, 1])
@pytest.mark.parametrize("name", sorted(BUILD))
def test_the_table_is_what_the_layer_predicts(world_size: int, name: str, sequence_dim: int | None) -> None:
    layer, shape = BUILD[name](mesh=tp(world_size), sequence_dim=sequence_dim)
    predicted = [*layer.collectives(*shape)] if name == "Attention" else [*layer.collectives(shape)]
    if name == "VocabParallelEmbedding":
        predicted += layer.logits_layout(3).collectives({"b": 2, "s": 5, "m": 6, "v": 8}, {"tp": 2})
    expected = Counter((row.phase, f"{row.operation} {row.tensor} over {row.axis}") for row in predicted)
    assert table(type(layer), int(sequence_dim is not None)) == expected


@distributed(world_size=2)
def test_parallel_says_what_keywords_say(world_size: int) -> None:
    mesh = tp(world_size)
    parallel = sg.Parallel(mesh, sequence_dim=1, dtype=D)
    x = randn(2, 3, 6, seed=1)
    for build in (sg.ColumnParallelLinear, sg.SwiGLU):
        torch.manual_seed(1)
        one = build(6, 8, parallel=parallel)
        torch.manual_seed(1)
        other = build(6, 8, mesh=mesh, sequence_dim=1, dtype=D)
        assert torch.equal(one(x, 6), other(x, 6))
        assert one.parallel == other.parallel
    assert repr(parallel).startswith("Parallel(axis='tp', sequence_dim=1, data=None")
    assert copy.deepcopy(parallel) is parallel


@distributed(world_size=2)
def test_wrong_keywords_are_refused_by_name(world_size: int) -> None:
    mesh = tp(world_size)
    parallel = sg.Parallel(mesh)
    wrong: list[tuple[Callable[..., object], dict[str, Any], str]] = [
        (
            sg.ColumnParallelLinear,
            {"mesh": mesh, "axes": "tp"},
            "ColumnParallelLinear got an unexpected .*'axes'",
        ),
        (
            sg.LayerNorm,
            {"mesh": mesh, "reduce_dtype": D},
            "LayerNorm got an unexpected .*'reduce_dtype'",
        ),
        (sg.SwiGLU, {"parallel": parallel, "axis": "tp"}, r"SwiGLU: axis=… besides parallel=…"),
        (sg.MLP, {}, r"MLP needs mesh=…, or parallel=sg.Parallel\(mesh, …\)"),
        (sg.MLP, {"parallel": mesh}, "MLP: parallel is a sg.Parallel, not DeviceMesh"),
        (sg.Conv1d, {"parallel": replace(parallel, data=sg.BatchAxis())}, "Conv1d knows no data"),
        (sg.MoE, {"num_experts": 2, "parallel": replace(parallel, sequence_dim=1)}, "MoE knows no sequence_dim"),
    ]
    for build, given, message in wrong:
        sizes = (6,) if build is sg.LayerNorm else (6, 8, 1) if build is sg.Conv1d else (6, 8)
        with pytest.raises(TypeError, match=message):
            build(*sizes, **given)


def trained(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x = x.clone().requires_grad_(x.is_floating_point())
    y = module(x)
    y.backward(dy)
    return y.detach(), x.grad


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_that_exists_is_taken_over(world_size: int, bias: bool) -> None:
    parallel = sg.Parallel(tp(world_size))
    for kind in (sg.ColumnParallelLinear, sg.RowParallelLinear):
        torch.manual_seed(2)
        plain = nn.Linear(7, 5, bias, dtype=D)
        before = torch.get_rng_state()
        layer = kind.from_linear(plain, parallel=parallel)
        assert torch.equal(torch.get_rng_state(), before)
        assert [name for name, _ in layer.named_parameters()] == [name for name, _ in plain.named_parameters()]
        for name, parameter, sharding in sg.named_shardings(layer):
            assert torch.equal(whole(parameter, sharding), plain.get_parameter(name).detach())
        layout = layer.layout(3)
        x, dy = randn(2, 3, 7, seed=1), randn(2, 3, 5, seed=2)
        y, dx = trained(layer, sg.shard(x, layout["X"], layer.mesh), sg.shard(dy, layout["Y"], layer.mesh))
        expected, right = trained(plain, x, dy)
        torch.testing.assert_close(sg.unshard(y, layout["Y"], layer.mesh), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sg.unshard(dx, layout["X"], layer.mesh), right, rtol=1e-12, atol=1e-12)
        assert_gradients_match(layer, plain)
        plain.weight.requires_grad_(False)
        assert not kind.from_linear(plain, mesh=layer.mesh).weight.requires_grad


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("sharded", [False, True])
def test_an_embedding_and_named_tensors_are_taken_over(world_size: int, sharded: bool) -> None:
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("tp", "dp") if sharded else ("dp", "tp"))
    torch.manual_seed(2)
    plain = nn.Embedding(7, 5, padding_idx=-1, dtype=D)
    where = {"mesh": mesh, "data": sg.BatchAxis("dp", shard_params=True)}
    layer = sg.VocabParallelEmbedding.from_embedding(plain, **where)
    ids, dy = torch.tensor([[0, 6, 3], [5, 5, 1], [2, 4, 6]]), randn(3, 3, 5, seed=2)
    spec = layer.logits_layout(3)["X"]
    rows = sg.shard(ids[..., None], spec, mesh)[..., 0], sg.shard(dy, spec, mesh)
    y, _ = trained(layer, *rows)
    expected, _ = trained(plain, ids, dy)
    torch.testing.assert_close(sg.unshard(y, spec, mesh, {"b": 3}), expected, rtol=1e-12, atol=1e-12)
    assert_gradients_match(layer, plain)
    with pytest.raises(ValueError, match="VocabParallelEmbedding has no max_norm"):
        sg.VocabParallelEmbedding.from_embedding(nn.Embedding(3, 4, max_norm=1.0), mesh=mesh)
    tensors = {name: randn(*shape, seed=at) for at, (name, shape) in enumerate(
        {"gate_weight": (7, 5), "up_weight": (7, 5), "down_weight": (5, 7)}.items())}  # fmt: skip
    gated = sg.SwiGLU.from_tensors(tensors, 5, 7, **where)
    for name, parameter, sharding in sg.named_shardings(gated):
        assert torch.equal(whole(parameter, sharding), tensors[name])
    with pytest.raises(sg.ShapeError, match=r"SwiGLU.down_weight has global shape \(5, 7\), but .* has \(7, 5\)"):
        sg.SwiGLU.from_tensors({**tensors, "down_weight": tensors["up_weight"]}, 5, 7, **where)
    tensors.pop("up_weight")
    with pytest.raises(sg.ShapeError, match="given are gate_weight, down_weight"):
        sg.SwiGLU.from_tensors(tensors, 5, 7, **where)


class Heads(OneProduct, layout="X[n/sp,d] W[h/tp,k,d] -> Y[n,h/tp,k] + B[h/tp,k]"):
    """A linear layer whose output features are whole heads."""

    def __init__(self, features: int, heads: int, head_dim: int, bias: bool = True, **where: Unpack[Where]) -> None:
        super().__init__(where)
        self.build({"d": features, "h": heads, "k": head_dim}, bias=bias)


@distributed(world_size=[1, 2, 3])
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_a_new_layer_is_a_layout_and_a_name(world_size: int, sequence_dim: int | None) -> None:
    layer = Heads(5, 4, 3, mesh=tp(world_size), sequence_dim=sequence_dim, dtype=D)
    (layout,) = layer.layouts(3)
    plain = nn.Linear(5, 12, dtype=D)
    with torch.no_grad():
        for name, parameter, sharding in sg.named_shardings(layer):
            full = whole(parameter, sharding)
            assert 0.5 * 5**-0.5 < float(full.abs().max()) <= 5**-0.5
            plain.get_parameter(name).copy_(full.flatten(0, 1))
    x, dy = randn(2, 7, 5, seed=1), randn(2, 7, 4, 3, seed=2)
    part = sg.shard(x, layout["X"], layer.mesh).requires_grad_()
    call = layer if sequence_dim is None else lambda x: layer(x, 7)
    for _ in range(2):
        layer.zero_grad()
        with sg.trace_collectives() as traced:
            call(part).backward(sg.shard(dy, layout["Y"], layer.mesh))
    plain(x).backward(dy.flatten(2))
    for name, parameter, sharding in sg.named_shardings(layer):
        right = plain.get_parameter(name).grad
        torch.testing.assert_close(whole(parameter.grad, sharding).flatten(0, 1), right, rtol=1e-12, atol=1e-12)
    predicted = layer.collectives((2, 7, 5), D)
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
        (event.operation, event.axis, event.bytes) for event in traced
    )
    assert table(Heads, 0) == {("dX", "all-reduce dX over tp"): 1}


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("shard_dim", ["out", "in", "groups", "batch", "sharded"])
def test_convolutions_predict_what_they_send(world_size: int, shard_dim: Any) -> None:
    mesh = tp(world_size)
    layer = sg.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, mesh=mesh, shard_dim=shard_dim, dtype=D)
    full = randn(5, 8, 6, 7, seed=1).unflatten(1, (4, 2))
    x = sg.shard(full, layer.layout["X"], mesh).flatten(1, 2).requires_grad_()
    for _ in range(2):
        with sg.trace_collectives() as traced:
            layer(x).square().sum().backward()
    predicted = layer.collectives((5, 8, 6, 7), D)
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
        (event.operation, event.axis, event.bytes) for event in traced
    )
    with pytest.raises(sg.ShapeError, match=r"x has global shape \[b, 8, …\], not \(5, 4, 6, 7\)"):
        layer.collectives((5, 4, 6, 7))


@distributed(world_size=1)
def test_sequence_dim_is_the_row_that_is_said(world_size: int) -> None:
    mesh = tp(world_size)
    for dim, spec in ((None, "b,s"), (0, "b/tp,s"), (1, "b,s/tp"), (-2, "b,s/tp"), (-3, "b/tp,s")):
        assert str(sg.ColumnParallelLinear(4, 6, mesh=mesh, sequence_dim=dim).layout(3)["X"]) == f"X[{spec},d]"
        assert str(sg.RowParallelLinear(4, 6, mesh=mesh, sequence_dim=dim).layout(3)["Y"]) == f"Y[{spec},m]"


@distributed(world_size=1)
def test_what_a_graph_depends_on_is_all_that_binding_is_given(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("tp", "dp", "cp"))
    layers = [
        sg.ColumnParallelLinear(4, 6, *bias, mesh=mesh, **more)
        for bias, more in (
            ((), {}),
            ((False,), {}),
            ((), {"axis": "cp"}),
            ((), {"sequence_dim": 0}),
            ((), {"sequence_dim": 1}),
            ((), {"reduce": False}),
            ((), {"save_gathered": ("X",)}),
            ((), {"reduce_dtype": D}),
            ((), {"data": sg.BatchAxis()}),
            ((), {"data": sg.BatchAxis(shard_params=True)}),
            ((), {"data": sg.BatchAxis(accumulate=True)}),
        )
    ]
    layers += [
        sg.ColumnParallelLinear(4, 5, mesh=mesh),
        sg.RowParallelLinear(4, 6, mesh=mesh),
        Heads(4, 2, 3, mesh=mesh),
    ]
    keys = [layer._recipes["X"].key for layer in layers]
    assert len(set(keys)) == len(layers)
    assert sg.ColumnParallelLinear(4, 6, mesh=mesh)._recipes["X"].key == keys[0]


@distributed(world_size=2)
def test_a_graph_is_not_used_for_a_layer_that_shards_another_dim(world_size: int) -> None:
    torch.compiler.reset()
    mesh = tp(world_size)
    x = randn(4, 4, 6, seed=1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, 8)

    for more in ({"sequence_dim": 1}, {"sequence_dim": 0}):
        layer = sg.ColumnParallelLinear(6, 8, mesh=mesh, dtype=D, **more)
        torch.testing.assert_close(call(layer, x), layer(x, 8), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@distributed(world_size=4)
def test_a_graph_is_not_used_for_a_layer_on_a_mesh_of_other_groups(world_size: int) -> None:
    torch.compiler.reset()
    names = ("tp", "dp")
    meshes = [init_device_mesh("cpu", (2, 2), mesh_dim_names=order) for order in (names, names[::-1])]
    layers = [sg.RowParallelLinear(8, 5, mesh=mesh, dtype=D) for mesh in meshes]
    x = randn(3, 4, seed=torch.distributed.get_rank())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    for layer in layers:
        torch.testing.assert_close(call(layer, x), layer(x), rtol=1e-12, atol=1e-12)


@distributed(world_size=2)
@pytest.mark.parametrize("sequence_dim", [None, 0])
def test_a_warm_call_passes_through_one_function_of_the_layers(world_size: int, sequence_dim: int | None) -> None:
    mesh = tp(world_size)
    up = sg.ColumnParallelLinear(6, 8, mesh=mesh, sequence_dim=sequence_dim)
    down = sg.RowParallelLinear(8, 6, mesh=mesh, sequence_dim=sequence_dim)
    x = torch.ones(3, 6, requires_grad=True)
    size = None if sequence_dim is None else 6
    for _ in range(2):
        down(up(x, size), size).sum().backward()
    frames: list[str] = []

    def called(frame: Any, event: str, _: object) -> None:
        if event == "call" and "/nn/" in frame.f_code.co_filename and "shardgrad" in frame.f_code.co_filename:
            frames.append(frame.f_code.co_name)

    sys.setprofile(called)
    try:
        y = down(up(x, size), size)
        y.sum().backward()
    finally:
        sys.setprofile(None)
    assert frames == ["forward", "forward"]


@distributed(world_size=[2, 3])
def test_what_does_not_fit_is_told_of_the_layer(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    row, gated = sg.RowParallelLinear(7, 4, mesh=mesh), sg.SwiGLU(5, 9, mesh=mesh)
    with pytest.raises(
        sg.ShapeError, match=r"^RowParallelLinear\(in_features=7, .* X has local shape \(3, 7\)"
    ) as told:
        row(torch.ones(3, 7))
    assert "because d = 7 is given" in str(told.value)
    assert "shard tensors with sg.shard" in str(told.value)
    with pytest.raises(sg.ShapeError, match=r"^SwiGLU\(embed_dim=5, .* X has local shape \(3, 4\)") as told:
        gated(torch.ones(3, 4))
    assert "sg.shard" not in str(told.value)  # no axis shards the dim that does not fit
    with pytest.raises(sg.ShapeError, match=r"^ColumnParallelLinear\(in_features=5"):
        sg.MLP(5, 9, mesh=mesh)(torch.ones(3, 4))


@distributed(world_size=2)
def test_keywords_and_dtypes_that_no_layer_has(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with pytest.raises(TypeError, match=r"'sequence_dims' \(sequence_dim is meant\?\): besides its own it takes"):
        sg.ColumnParallelLinear(3, 5, mesh=mesh, sequence_dims=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"data must be a sg.BatchAxis, as sg.BatchAxis\('dp'\), not 'dp'"):
        sg.ColumnParallelLinear(3, 5, mesh=mesh, data="dp")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype=torch.int32 takes no gradients"):
        sg.ColumnParallelLinear(3, 5, mesh=mesh, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"dtype must be dtype \| None, not str 'float32': .*torch.float32$"):
        sg.ColumnParallelLinear(3, 5, mesh=mesh, dtype="float32")  # type: ignore[arg-type]


@distributed(world_size=2)
def test_how_a_parameter_is_stored_is_shown_in_a_line(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    stored = sg.ColumnParallelLinear(3, 5, mesh=mesh).shardings()["weight"]
    assert repr(stored) == f"ParamSharding(W[m/tp,d], (5, 3), mesh={mesh!r})"
    part = sg.ParamSharding(stored.spec, (5, 3), mesh, merged=(15,))
    assert repr(part) == f"ParamSharding(W[m/tp,d], (5, 3), mesh={mesh!r}, merged=(15,))"
