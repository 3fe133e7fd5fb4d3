"""Norms and counts over all shards against one device's, which holds everything once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from plain import randn, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.utils import parametrizations

import shardgrad as sg
from shardgrad.nn.global_ops import clip_grad_norm_, num_parameters
from shardgrad.nn.module import ShardedModule
from shardgrad.testing import distributed

D = torch.float64


class Table(ShardedModule):
    """A parameter alone, cut in whatever way: no layer of the library cuts one over two axes."""

    def __init__(self, mesh: DeviceMesh, shape: Sequence[int], *cuts: str, dtype: torch.dtype = D) -> None:
        super().__init__(mesh, [axis for cut in cuts for axis in cut.split("/") if axis])
        storage = ",".join(f"{letter}/{cut}" if cut else letter for letter, cut in zip("ab", cuts))
        self.declare("weight", f"W[{storage}]", dict(zip("ab", shape)), dtype=dtype)
        nn.init.zeros_(self.get_parameter("weight"))


def layers(mesh: DeviceMesh, dtype: torch.dtype = D) -> nn.Module:
    """Columns, rows, vocabulary, replicated norms, a plain layer; with 5 and 7 features, and 2 over as many ranks."""
    return nn.Sequential(
        sg.VocabParallelEmbedding(11, 5, mesh=mesh, dtype=dtype),
        sg.LayerNorm(5, mesh=mesh, dtype=dtype),
        sg.ColumnParallelLinear(5, 7, mesh=mesh, dtype=dtype),
        sg.RowParallelLinear(7, 5, mesh=mesh, dtype=dtype),
        sg.ColumnParallelLinear(5, 2, mesh=mesh, dtype=dtype),
        nn.Linear(3, 4, dtype=dtype),
    )


def grid(mesh: DeviceMesh) -> nn.Module:
    """Parameters cut over every set of the axes dp and tp."""
    cuts = [("", ""), ("dp", ""), ("", "tp"), ("dp", "tp"), ("tp", "dp"), ("dp/tp", ""), ("", "tp/dp")]
    return nn.Sequential(*(Table(mesh, (5 + at, 7), *cut) for at, cut in enumerate(cuts)), sg.RMSNorm(3, mesh=mesh))


def give_gradients(model: nn.Module, scale: float = 1.0) -> list[nn.Parameter]:
    """Random gradients, stored as the parameters; and one device's parameters with the same."""
    plain = []
    for at, (_, parameter, sharding) in enumerate(sg.named_shardings(model)):
        full = scale * randn(*(parameter.shape if sharding is None else sharding.shape), seed=at).to(parameter.dtype)
        parameter.grad = full.clone() if sharding is None else sg.shard(full, sharding.spec, sharding.mesh)
        plain.append(nn.Parameter(torch.zeros_like(full)))
        plain[-1].grad = full
    return plain


def assert_clipped_as_one_device(model: nn.Module, max_norm: float, order: float) -> None:
    plain = give_gradients(model)
    expected = nn.utils.clip_grad_norm_(plain, max_norm, order)
    found = clip_grad_norm_(model, max_norm, order)
    assert found.shape == ()
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, (name, parameter, sharding) in zip(plain, sg.named_shardings(model)):
        assert parameter.grad is not None
        assert one.grad is not None
        tolerance = {"rtol": 1e-12, "atol": 1e-15} if parameter.dtype == D else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(
            whole(parameter.grad, sharding), one.grad, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("order", [1.0, 2.0, 3.5, -2.0, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [0.37, 1e6])
def test_clipped_as_one_device_does(world_size: int, order: float, max_norm: float) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    assert_clipped_as_one_device(layers(mesh), max_norm, order)


@distributed(world_size=4)
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1)])
def test_axes_that_cut_different_parameters(world_size: int, order: float, shape: tuple[int, int]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    assert_clipped_as_one_device(grid(mesh), 0.5, order)
    assert_clipped_as_one_device(layers(mesh), 0.5, order)  # dp holds replicas


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("order", [1.0, 2.0])
def test_replicas_count_once(world_size: int, order: float) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = nn.Sequential(sg.LayerNorm(8, mesh=mesh), nn.Linear(4, 2), sg.RowParallelLinear(3, 6, mesh=mesh))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    once = 8 + 8 + 8 + 2 + 18 + 6
    assert num_parameters(model) == once
    torch.testing.assert_close(clip_grad_norm_(model, math.inf, order), torch.tensor(once ** (1 / order)))
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)  # inf only measures


@distributed(world_size=[1, 4])
def test_one_all_reduce_for_each_axis_that_cuts_whoever_has_gradients(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size // 2 or 1, min(world_size, 2)), mesh_dim_names=("dp", "tp"))
    for model, axes in ((layers(mesh), ["tp"]), (grid(mesh), ["dp", "tp"]), (nn.Linear(2, 2), [])):
        clip_grad_norm_(model, 1.0)  # the first call also compares the ranks
        with sg.trace_collectives() as traced:
            assert clip_grad_norm_(model, 1.0) == 0
        assert [(e.operation, e.axis) for e in traced] == [("all-reduce", axis) for axis in axes if world_size > 1]
    frozen = sg.ColumnParallelLinear(3, 5, mesh=mesh, dtype=D).requires_grad_(False)
    assert clip_grad_norm_(frozen, 1.0) == 0
    assert clip_grad_norm_(nn.Sequential(), 1.0) == 0


@distributed(world_size=[2, 4])
@pytest.mark.parametrize("order", [2.0, math.inf])
def test_parameters_without_gradient_and_shards_of_nothing(world_size: int, order: float) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model, rank = layers(mesh), mesh.get_rank()
    plain = give_gradients(model)
    for at, parameter in enumerate(model.parameters()):
        if at in (0, 4, 9) or parameter.numel() == 0:  # for all ranks, and for the one that holds nothing of it
            parameter.grad = None
        if at in (0, 4, 9):
            plain[at].grad = None
    lonely = sg.ColumnParallelLinear(3, 1, bias=False, mesh=mesh, dtype=D)  # all of it on the first rank
    lonely.weight.grad = randn(*lonely.weight.shape, seed=5) if rank == 0 else None
    plain.append(nn.Parameter(torch.zeros(1, 3, dtype=D)))
    plain[-1].grad = randn(1, 3, seed=5)
    found = clip_grad_norm_(nn.Sequential(model, lonely), 0.1, order)
    torch.testing.assert_close(found, nn.utils.clip_grad_norm_(plain, 0.1, order), rtol=1e-12, atol=0)


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("order", [2.0, math.inf])
def test_the_norm_is_alike_on_all_ranks_bit_for_bit(world_size: int, order: float) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = layers(mesh)
    give_gradients(model)
    own = clip_grad_norm_(model, 1.0, order)
    everyones = [torch.empty_like(own) for _ in range(world_size)]
    torch.distributed.all_gather(everyones, own)
    for value in everyones:
        assert torch.equal(value, own)


@distributed(world_size=2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_summed_in_float32(world_size: int, dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = nn.Sequential(Table(mesh, (300, 100), "tp", "", dtype=dtype), sg.LayerNorm(300, mesh=mesh, dtype=dtype))
    plain = give_gradients(model, scale=30.0)  # the squares' sum is beyond float16, and the norm is no bfloat16
    exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain if p.grad is not None))
    found = clip_grad_norm_(model, 1.0)
    assert found.dtype == torch.float32
    assert abs(float(found) - exact) < 1e-5 * exact  # bfloat16 is good to 4e-3
    for one, (_, parameter, sharding) in zip(plain, sg.named_shardings(model)):
        assert parameter.grad is not None
        assert one.grad is not None
        assert parameter.grad.dtype == dtype
        scaled = one.grad.float() / (exact + 1e-6)
        torch.testing.assert_close(whole(parameter.grad, sharding).float(), scaled, rtol=2**-8, atol=1e-6)


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sick", [0, 1])
def test_a_gradient_of_one_rank_that_is_not_finite_is_seen_by_all(
    world_size: int, order: float, bad: float, sick: int
) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = layers(mesh)
    give_gradients(model)
    if mesh.get_rank() == sick:
        weight = model.get_submodule("2").get_parameter("weight")
        assert weight.grad is not None
        weight.grad[0, 0] = bad
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError, match=f"norm of order {order} of the gradients is {abs(bad)}"):
        clip_grad_norm_(model, 1.0, order, error_if_nonfinite=True)
    for old, parameter in zip(before, model.parameters()):  # nothing was scaled
        torch.testing.assert_close(parameter.grad, old, rtol=0, atol=0, equal_nan=True)
    found = clip_grad_norm_(model, 1.0, order)
    assert math.isnan(found) if math.isnan(bad) else math.isinf(found)


@distributed(world_size=4)
def test_several_meshes_in_one_model(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    submesh = nn.Sequential(layers(mesh), layers(mesh["tp"]))
    assert_clipped_as_one_device(submesh, 0.5, 2.0)
    with sg.trace_collectives() as traced:
        clip_grad_norm_(submesh, 1.0)
    assert len(traced) == 1  # one group, whether the mesh or its part names it
    for order in (2.0, math.inf):
        assert_clipped_as_one_device(nn.Sequential(grid(mesh), layers(line), layers(mesh)), 0.5, order)


@distributed(world_size=[1, 3])
def test_the_number_of_parameters(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = layers(mesh)
    expected = 55 + 10 + (35 + 7) + (35 + 5) + (10 + 2) + 16
    assert num_parameters(model) == expected
    head = sg.ColumnParallelLinear(5, 11, bias=False, mesh=mesh, dtype=D)
    head.weight = model.get_submodule("0").get_parameter("weight")
    assert num_parameters(nn.Sequential(model, head)) == expected


@distributed(world_size=2)
def test_a_parameter_shared_with_a_plain_module_is_still_a_shard(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    plain, sharded = nn.Linear(3, 4), sg.ColumnParallelLinear(3, 8, mesh=mesh)
    plain.weight = sharded.weight  # the plain one comes first
    model = nn.Sequential(plain, sharded)
    assert num_parameters(model) == 4 + 8 * 3 + 8
    sharded.weight.grad = torch.ones(4, 3)
    torch.testing.assert_close(clip_grad_norm_(model, 1.0), torch.tensor(24**0.5))


@distributed(world_size=2)
def test_wrong_uses_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layer = sg.ColumnParallelLinear(3, 5, mesh=mesh)
    with pytest.raises(TypeError, match=r"parameters.0 of shape \(3, 3\) does not say how .* pass the model|\(2, 3\)"):
        clip_grad_norm_(layer.parameters(), 1.0)
    for wrong, told in (
        (None, "a module, a tensor or tensors, not NoneType None"),
        ([3], "parameters.0 must be a tensor, not int 3"),
    ):
        with pytest.raises(TypeError, match=told):
            clip_grad_norm_(wrong, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"max_norm must be a number, not str x"):
        clip_grad_norm_(layer, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a module, not generator"):
        num_parameters(layer.parameters())  # type: ignore[arg-type]
    for order in (0, math.nan):
        with pytest.raises(ValueError, match=r"norm_type must be a number but 0 .*, not"):
            clip_grad_norm_(layer, 1.0, order)
    with pytest.raises(sg.ShapeError, match=r"0.weight was a parameter of the layer and is a Tensor now"):
        num_parameters(nn.Sequential(parametrizations.weight_norm(sg.ColumnParallelLinear(3, 5, mesh=mesh))))
    replaced = sg.ColumnParallelLinear(3, 5, mesh=mesh)
    replaced.weight = nn.Parameter(torch.ones(5, 3))
    with pytest.raises(sg.ShapeError, match=r"weight has local shape \(5, 3\), but W\[m/tp,d\] of global shape"):
        num_parameters(replaced)
    replaced.weight = nn.Parameter(DTensor.from_local(torch.ones(3 - mesh.get_rank(), 3), mesh, [Shard(0)]))
    with pytest.raises(sg.MeshError, match=r"weight is a DTensor \(FSDP2\?\) over ranks \[0, 1\] of a tensor that"):
        clip_grad_norm_(replaced, 1.0)
    plain = nn.Linear(4, 2)
    plain.weight = nn.Parameter(DTensor.from_local(torch.ones(1, 4), mesh, [Partial()]))
    with pytest.raises(TypeError, match=r"0.weight is a DTensor that is partial"):
        clip_grad_norm_(nn.Sequential(plain, layer), 1.0)
    plain.weight = nn.Parameter(DTensor.from_local(torch.ones(1, 4), mesh, [Shard(0)]))  # torch's own, beside ours
    plain.weight.grad = DTensor.from_local(torch.full((1, 4), 2.0), mesh, [Shard(0)])
    assert num_parameters(nn.Sequential(plain, layer)) == 8 + 2 + 15 + 5
    torch.testing.assert_close(clip_grad_norm_(nn.Sequential(plain, layer), 1.0), torch.tensor(32**0.5))
    column, row = sg.ColumnParallelLinear(4, 4, mesh=mesh), sg.RowParallelLinear(8, 2, mesh=mesh)
    row.weight = column.weight
    with pytest.raises(sg.LayoutError, match=r"0.weight and 1.weight are one parameter, but stored differently"):
        num_parameters(nn.Sequential(column, row))


@distributed(world_size=2)
@pytest.mark.parametrize("order", [2.0, -math.inf])
def test_parameters_that_know_their_shards_as_torch_takes_them(world_size: int, order: float) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    full = randn(5, 3, seed=1)
    plain = nn.Parameter(torch.zeros_like(full))
    plain.grad = full.clone()
    dtensor = nn.Parameter(distribute_tensor(torch.zeros_like(full), mesh, [Shard(0)]))
    dtensor.grad = distribute_tensor(full, mesh, [Shard(0)])
    expected = nn.utils.clip_grad_norm_([plain], 0.01, order, error_if_nonfinite=True, foreach=False)
    found = clip_grad_norm_(iter([dtensor]), 0.01, order, True, False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dtensor.grad.full_tensor(), plain.grad, rtol=1e-12, atol=0)


@distributed(world_size=2)
def test_ranks_that_mean_different_norms_are_told(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layer = sg.ColumnParallelLinear(3, 5, mesh=mesh)
    with pytest.raises(sg.DisagreementError, match=r"the norm of the gradients:\n  rank 0: norm_type 2.0"):
        clip_grad_norm_(layer, 1.0, 2.0 if mesh.get_rank() == 0 else math.inf)
