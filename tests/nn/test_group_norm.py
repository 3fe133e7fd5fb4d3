"""GroupNorm over channels that an axis shards, against torch's over all of them, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from plain import assert_gradients_match, load_from, randn
from test_compile import assert_same, tp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.layout.notation import parse_tensor
from shardgrad.testing import distributed

D = torch.float64
# Groups, how the channels are stored, their letters' sizes, groups in parts by the number of ranks.
CASES = [
    (4, "c/tp", {"c": 24}, {1: 0, 2: 0, 3: 2, 4: 0, 8: 4}),
    (3, "c/tp", {"c": 21}, {1: 0, 2: 1, 3: 0, 4: 3, 8: 3}),
    (1, "c/tp", {"c": 5}, {1: 0, 2: 1, 3: 1, 4: 1, 8: 1}),  # ranks without channels on 4 and 8 ranks
    (5, "c/tp", {"c": 5}, dict.fromkeys((1, 2, 3, 4, 8), 0)),
    (5, "h/tp,k", {"h": 5, "k": 3}, dict.fromkeys((1, 2, 3, 4, 8), 0)),  # by heads
    (2, "g,f/tp", {"g": 2, "f": 7}, {1: 0, 2: 2, 3: 2, 4: 2, 8: 2}),  # every rank a part of every group
    (2, "h/tp", {"h": 2}, dict.fromkeys((1, 2, 3, 4, 8), 0)),
]


def both(mesh: DeviceMesh, groups: int, stored: str, sizes: dict[str, int], **more: object) -> tuple[nn.Module, ...]:
    channels = math.prod(sizes.values())
    sharded = sg.GroupNorm(groups, channels, 1e-3, stored=stored, sizes=sizes, mesh=mesh, dtype=D, **more)
    with torch.no_grad():
        for name, parameter, sharding in sg.named_shardings(sharded):
            assert sharding is not None
            assert sharding.global_shape == (channels,)
            parameter.copy_(sharding.shard(randn(channels, seed=len(name))))
    return sharded, load_from(nn.GroupNorm(groups, channels, 1e-3, dtype=D), sharded)


def part(x: torch.Tensor, stored: str, sizes: dict[str, int], mesh: DeviceMesh) -> torch.Tensor:
    """This rank's channels, of x [n, channels, ...]."""
    rest = [f"r{at}" for at in range(x.dim() - 2)]
    split = x.detach().unflatten(1, list(sizes.values()))
    return sg.shard(split, parse_tensor(f"X[{','.join(['n', stored, *rest])}]"), mesh).flatten(1, len(sizes))


@distributed(world_size=[1, 2, 3, 4, 8])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_as_on_one_device_with_the_collectives_that_are_predicted(world_size: int, case: int, balanced: bool) -> None:
    groups, stored, sizes, in_parts = CASES[case]
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    if balanced:
        sg.set_balanced(mesh)
    sharded, plain = both(mesh, groups, stored, sizes)
    for at, rest in enumerate(((), (4,), (3, 2))):
        shape = (3, math.prod(sizes.values()), *rest)
        if not rest and shape[1] == groups:
            continue  # of one element each: torch refuses
        x, dy = 3 + randn(*shape, seed=at), randn(*shape, seed=10 + at)
        local = part(x, stored, sizes, mesh).requires_grad_()
        for parameter in (*sharded.parameters(), *plain.parameters()):
            parameter.grad = None
        with sg.trace_collectives() as traced:
            y = sharded(local)
            y.backward(part(dy, stored, sizes, mesh))
        x.requires_grad_()
        expected = plain(x)
        expected.backward(dy)
        assert local.grad is not None
        assert x.grad is not None
        torch.testing.assert_close(y.detach(), part(expected, stored, sizes, mesh), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(local.grad, part(x.grad, stored, sizes, mesh), rtol=1e-11, atol=1e-11)
        assert_gradients_match(sharded, plain)
        predicted = sharded.collectives(shape, D)  # type: ignore[operator]
        assert [(c.operation, c.axis, c.bytes) for c in predicted] == [(e.operation, e.axis, e.bytes) for e in traced]
        if not balanced:
            parts = in_parts[world_size]
            assert [event.bytes for event in traced] == [2 * 3 * parts * (world_size - 1) * 8] * (2 * bool(parts))


@distributed(world_size=[2, 3])
def test_second_derivatives_follow(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    some_have_none = (2, "c/tp", {"c": 2})
    for groups, stored, sizes in ((1, "c/tp", {"c": 5}), (2, "g,f/tp", {"g": 2, "f": 7}), some_have_none):
        sharded, plain = both(mesh, groups, stored, sizes)
        shape = (2, math.prod(sizes.values()), 3)
        whole = [randn(*shape, seed=seed) for seed in (1, 2, 3)]
        made = []
        for call, given in ((sharded, [part(one, stored, sizes, mesh) for one in whole]), (plain, whole)):
            x, dy, ddx = (one.clone().requires_grad_() for one in given)
            (first,) = torch.autograd.grad(call(x), x, dy, create_graph=True)
            made.append(torch.autograd.grad(first, (x, dy), ddx))
        for found, right in zip(*made):
            torch.testing.assert_close(found, part(right, stored, sizes, mesh), rtol=1e-10, atol=1e-11)


@distributed(world_size=[2, 3])
def test_rows_without_elements_nan_and_sixteen_bits(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    sharded, plain = both(mesh, 3, "c/tp", {"c": 12})
    x = randn(2, 12, 5, seed=1)
    x[1, 5, 2] = math.nan
    y, expected = sharded(part(x, "c/tp", {"c": 12}, mesh)), plain(x)
    torch.testing.assert_close(y, part(expected, "c/tp", {"c": 12}, mesh), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert int(expected.isnan().sum()) == 4 * 5  # of its group alone
    half = (100 * randn(2, 12, 50, seed=2)).bfloat16()
    found = sg.GroupNorm(3, 12, mesh=mesh)(part(half, "c/tp", {"c": 12}, mesh))
    assert found.dtype == torch.bfloat16
    right = part(torch.nn.functional.group_norm(half.double(), 3), "c/tp", {"c": 12}, mesh)
    bound = torch.finfo(torch.bfloat16).eps / 2
    torch.testing.assert_close(found.double(), right, rtol=1.01 * bound, atol=1e-4)
    empty = part(torch.zeros(0, 12, 5, dtype=D), "c/tp", {"c": 12}, mesh).requires_grad_()
    sharded(empty).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape


@distributed(world_size=[2, 3])
def test_a_mean_far_from_zero_does_not_cancel(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    x = (1000 + randn(5, 12, 2, seed=1)).float()
    found = sg.GroupNorm(1, 12, mesh=mesh, affine=False)(part(x, "c/tp", {"c": 12}, mesh))
    right = part(torch.nn.functional.group_norm(x.double(), 1), "c/tp", {"c": 12}, mesh)
    torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-4)  # sums of squares alone: off by 0.1


@distributed(world_size=4)
def test_rows_over_another_axis(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    sizes = {"c": 9}
    sharded, plain = both(mesh, 3, "c/tp", sizes, data=sg.BatchAxis())
    x, dy = randn(5, 9, 2, seed=1), randn(5, 9, 2, seed=2)
    spec = parse_tensor("X[n/dp,c/tp,s]")
    with sg.trace_collectives() as traced:
        sharded(sg.shard(x, spec, mesh).requires_grad_()).backward(sg.shard(dy, spec, mesh))
    plain(x).backward(dy)
    assert_gradients_match(sharded, plain)
    predicted = sharded.collectives((5, 9, 2), D)  # type: ignore[operator]
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
        (e.operation, e.axis, e.bytes) for e in traced
    )


@distributed(world_size=2)
def test_behind_a_convolution_with_its_state(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(3)
    conv, norm = sg.Conv2d(3, 9, 3, mesh=mesh, dtype=D), sg.GroupNorm(3, 9, mesh=mesh, dtype=D)
    sharded = nn.Sequential(conv, norm)
    plain = load_from(nn.Sequential(nn.Conv2d(3, 9, 3, dtype=D), nn.GroupNorm(3, 9, dtype=D)), sharded)
    x, dy = randn(2, 3, 5, 4, seed=4), randn(2, 9, 3, 2, seed=5)
    sharded(x).backward(part(dy, "c/tp", {"c": 9}, mesh))
    plain(x).backward(dy)
    assert_gradients_match(sharded, plain)
    again = copy.deepcopy(sharded)
    sg.load_state_dict(again, {name: 2 * one for name, one in sg.state_dict(sharded).items()})
    assert torch.equal(again[1].weight, 2 * norm.weight)


@pytest.mark.slow
@distributed(world_size=2)
def test_under_torch_compile(world_size: int) -> None:
    mesh = tp(2)
    sharded, _ = both(mesh, 3, "c/tp", {"c": 9})
    assert_same(sharded, [part(randn(2, 9, 4, seed=1), "c/tp", {"c": 9}, mesh)], sharded, "eager")


@distributed(world_size=2)
def test_what_is_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with pytest.raises(sg.ShapeError, match="num_groups=4 must divide num_channels=6"):
        sg.GroupNorm(4, 6, mesh=mesh)
    with pytest.raises(sg.ShapeError, match=r"product of the sizes of 'h/tp,k', .*num_channels=6"):
        sg.GroupNorm(2, 6, stored="h/tp,k", sizes={"h": 2, "k": 2}, mesh=mesh)
    with pytest.raises(sg.LayoutError, match=r"stored='c' must shard one letter.*nn\.GroupNorm is enough"):
        sg.GroupNorm(2, 6, stored="c", mesh=mesh)
    with pytest.raises(sg.LayoutError, match=r"'tp' shards channels .* not rows \(sequence_dim=1\)"):
        sg.GroupNorm(2, 6, mesh=mesh, sequence_dim=1)
    with pytest.raises(sg.ShapeError, match="dim 1 is the 3 of 6 channels"):
        sg.GroupNorm(2, 6, mesh=mesh)(torch.ones(2, 6))
    sg.set_exact(mesh, 2)
    with pytest.raises(sg.LayoutError, match=r"GroupNorm cannot be exact.*sg\.LayerNorm"):
        sg.GroupNorm(2, 6, mesh=mesh)(torch.ones(2, 3))
