"""The layers and the GPT type-check under spmd_types, a checker by others; planted errors do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.comm import adjoint
from shardgrad.testing import distributed
from shardgrad.train.model import GPT

spmd = pytest.importorskip("spmd_types")
from spmd_types import I, P, R, SpmdTypeError, V  # noqa: E402

from shardgrad.layout.notation import parse_tensor  # noqa: E402
from shardgrad.verification.spmd_types import _PAIRS, annotate, typecheck, typed  # noqa: E402


def kind(x: Tensor, mesh: torch.distributed.DeviceMesh, axis: str = "tp") -> object:
    return spmd.get_local_type(x)[spmd.normalize_axis(mesh.get_group(axis))]


@distributed(world_size=[2, 3])
def test_gpt_forward_and_backward_type_check(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = GPT(layers=2, heads=3, d_model=12, seq_len=6, vocab=7, mesh=mesh)
    ids, targets = torch.randint(0, 7, (2, 5)), torch.randint(0, 7, (2, 5))
    plain = model.loss(ids, targets)
    with typecheck(mesh):
        annotate(model)
        for tokens in (ids, targets):
            typed(tokens, parse_tensor("T[b,s]"), mesh)
        loss = model.loss(ids, targets)
        assert kind(loss, mesh) is I
        loss.backward()
    assert torch.equal(loss, plain)
    assert all(parameter.grad is not None for parameter in model.parameters())


@distributed(world_size=2)
def test_a_norm_that_forgets_its_sequence_is_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = GPT(layers=1, heads=3, d_model=12, seq_len=6, vocab=7, mesh=mesh)
    norm = model.blocks[0].mlp_norm
    norm.parallel = replace(norm.parallel, sequence_dim=None)  # its gradient would lack the other ranks' rows
    with typecheck(mesh):
        annotate(model)
        ids = typed(torch.randint(0, 7, (2, 5)), parse_tensor("T[b,s]"), mesh)
        with pytest.raises(SpmdTypeError, match="Invariant type"):
            model(ids)


@distributed(world_size=[2, 3])
def test_a_forgotten_all_reduce_is_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    forgot = sg.Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp}")
    x, w = torch.randn(4, 6), torch.randn(6, 5)
    with typecheck(mesh):
        xs = typed(sg.shard(x, forgot["X"], mesh), forgot["X"], mesh)
        ws = typed(sg.shard(w, forgot["W"], mesh).requires_grad_(), forgot["W"], mesh)
        y = sg.matmul(xs, ws, forgot, mesh)
        assert kind(y, mesh) is P
        with pytest.raises(SpmdTypeError, match="Partial"):
            torch.relu(y)
        column = sg.PRESETS["column"]
        ones = torch.ones(5, 4 * world_size, requires_grad=True)
        other = typed(sg.shard(ones, column["W"], mesh).requires_grad_(), column["W"], mesh)
        with pytest.raises(SpmdTypeError, match=r"X\[n,d\] of .*must be I, but it is P"):
            sg.matmul(y, other, column, mesh)
        whole = sg.all_reduce(y, mesh)
        assert kind(whole, mesh) is I
        torch.relu(whole)
        with pytest.raises(SpmdTypeError, match="must be P or V, but it is I"):
            sg.all_reduce(whole, mesh)  # reduced twice
        sg.matmul(whole, other, column, mesh).sum().backward(torch.tensor(1.0))


@distributed(world_size=2)
def test_each_adjoint_pair_says_its_types(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))

    def value(of: object) -> Tensor:
        x = torch.randn(4, 6, requires_grad=True)
        spmd.assert_type(x, {mesh.get_group("tp"): of})
        return x

    pairs = [
        ("replicate", I, R, lambda x: sg.replicate(x, mesh)),
        ("all_reduce", P, I, lambda x: sg.all_reduce(x, mesh)),
        ("all_gather", V, R, lambda x: sg.all_gather(x, mesh, size=8)),
        ("gather_replicated", V, I, lambda x: sg.gather_replicated(x, mesh)),
        ("reduce_scatter", P, V, lambda x: sg.reduce_scatter(x, mesh)),
        ("slice_replicated", I, V, lambda x: sg.slice_replicated(x, mesh)),
        ("all_to_all", V, V, lambda x: sg.all_to_all(x, mesh, split_dim=1, concat_dim=0)),
        ("all_to_all_rows", V, V, lambda x: sg.all_to_all_rows(x, mesh, send=[2, 2], receive=[2, 2])),
    ]
    assert [name for name, *_ in pairs] == list(_PAIRS)
    assert set(_PAIRS) == set(adjoint._PAIRS) - {"nothing"}  # which is no collective
    for _, before, after, pair in pairs:
        with typecheck(mesh):
            out = pair(value(before))
            assert kind(out, mesh) is after
            for wrong in {I, R, P, V} - {before} - ({V} if before is P else set()):
                with pytest.raises(SpmdTypeError, match="it must be"):
                    pair(value(wrong))


@distributed(world_size=2)
@pytest.mark.parametrize("name", ["column", "row", "column_sequence", "row_sequence", "column_wx"])
def test_layouts_say_their_types(world_size: int, name: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    layout = sg.PRESETS[name]
    sizes = dict(zip(layout.letters, (4, 6, 5)))
    with typecheck(mesh):
        x, w = (
            typed(sg.shard(torch.ones([sizes[letter] for letter in s.letters]), s, mesh).requires_grad_(), s, mesh)
            for s in (layout.lhs, layout.rhs)
        )
        y = sg.matmul(x, w, layout, mesh, sizes=sizes)
        assert kind(y, mesh) is (V if layout.out.axes else I)


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("sequence_dim", [None, 0])
def test_layers_type_check(world_size: int, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = nn.Sequential(
        sg.LayerNorm(6, mesh=mesh, sequence_dim=sequence_dim),
        sg.ColumnParallelLinear(6, 9, mesh=mesh, sequence_dim=sequence_dim),
        nn.GELU(),
        sg.RowParallelLinear(9, 6, mesh=mesh, sequence_dim=sequence_dim),
        sg.RMSNorm(6, mesh=mesh, sequence_dim=sequence_dim),
    )
    expected = I if sequence_dim is None else V
    rows = torch.randn(4, 6)
    with typecheck(mesh):
        annotate(model)
        spmd.assert_type(rows, {mesh.get_group("tp"): expected})
        assert kind(model(rows), mesh) is expected


@distributed(world_size=4)
def test_data_parallel_beside_tensor_parallel(world_size: int) -> None:
    """Rows cut over dp: weights whose gradients nobody sums over it are refused, and DDP's are not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = sg.ColumnParallelLinear(6, 9, mesh=mesh)
    with typecheck(mesh):
        x = torch.randn(4, 6)
        spmd.assert_type(x, {mesh.get_group("dp"): V, mesh.get_group("tp"): I})
        annotate(layer)
        with pytest.raises(SpmdTypeError, match="does not mention axis 'dp'"):
            layer(x)
    layer = sg.ColumnParallelLinear(6, 9, mesh=mesh)
    with typecheck(mesh):
        annotate(layer, summed=("dp",))
        y = layer(x)
        assert (kind(y, mesh, "dp"), kind(y, mesh)) == (V, V)
    fsdp = sg.PRESETS["fully_sharded"]
    with typecheck(mesh):
        x, w = (
            typed(sg.shard(torch.ones(shape), spec, mesh).requires_grad_(), spec, mesh)
            for shape, spec in (((4, 6), fsdp.lhs), ((6, 5), fsdp.rhs))
        )
        assert kind(sg.matmul(x, w, fsdp, mesh, sizes={"n": 4}), mesh, "dp") is V
