"""The 3D model in exact mode: equal bits in every step on any mesh of z, x and y, and as one device has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from bits import Whole, differing, from_the_left
from launched import launched
from refused import refusal
from tiny import fill
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import silu

import shardgrad as sg
from shardgrad import checkpoint
from shardgrad.errors import LayoutError
from shardgrad.layout.cost import totals
from shardgrad.nn.pieces import in_pieces
from shardgrad.ops import exact
from shardgrad.testing import distributed
from shardgrad.train import folder, grid
from shardgrad.train.build import build_reference
from shardgrad.train.config import Model, Train, load, pieces
from shardgrad.train.grid import Grid
from shardgrad.train.predict import step_collectives
from shardgrad.train.step import backward, train_step

AXES = ("z", "x", "y")
FEW = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2)]
MORE = [*FEW, (4, 1, 1), (1, 4, 1), (1, 1, 4)]


def trained(
    cuts: dict[str, int] | None, *, size: int = 2, steps: int = 3, accumulate: int = 1, **more: Any
) -> Callable[[DeviceMesh], Whole]:
    """Steps of AdamW: losses, norms, the first gradients and all parameters; and the bytes of a step as predicted.

    size: pieces divide what the axes split if they divide this.
    """

    def run(mesh: DeviceMesh) -> Whole:
        torch.manual_seed(3)
        sizes = {"heads": size**2, "d_model": 6 * size**2, "seq_len": 3 * size, "vocab": 7 * size, "d_ff": 5 * size}
        model = Grid(**{"layers": 1, **sizes, "mesh": mesh, **more})
        sg.set_exact(mesh, cuts)
        settings = Train(steps=steps + 1, batch=2 * size, lr=1e-3, accumulate=accumulate, clip=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator, values = torch.Generator().manual_seed(5), {}
        for step in range(steps):
            ids = torch.randint(0, sizes["vocab"], (2 * size, 3 * size + 1), generator=generator)
            with sg.trace_collectives() as traced:
                done = train_step(model, optimizer, ids[:, :-1], ids[:, 1:], settings)
            assert done.norm is not None
            values |= {f"loss of step {step}": done.loss, f"norm of step {step}": done.norm}
            if step == 0:  # in which ranks also compare what they see for the first time
                values |= {f"gradient of {name}": s.unshard(p.grad) for name, p, s in sg.named_shardings(model)}
            elif not model.dropout.p:  # which now and then compares its keys, too
                batch = (2 * size, 3 * size)
                predicted = step_collectives(model, *batch, accumulate=accumulate, clip=True)
                assert totals(predicted) == traced.totals(), tuple(mesh.shape)
        return values | {name: s.unshard(p) for name, p, s in sg.named_shardings(model)}

    return run


@pytest.mark.slow
@distributed(world_size=[4], timeout=120, backend="shm")
def test_equal_bits_and_bytes_as_predicted(world_size: int) -> None:
    assert differing(AXES, FEW, trained({"z": 2, "x": 2, "y": 2})) == {}


@distributed(world_size=[4], timeout=120, backend="shm")
@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize(
    "more",
    [
        {"compute_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
        {"dropout": 0.2, "recompute": "full"},
    ],
    ids=str,
)
def test_more_ways_and_pieces(world_size: int, more: dict[str, Any]) -> None:
    assert differing(AXES, FEW, trained({"z": 2, "x": 2, "y": 2}, steps=4, **more)) == {}
    assert differing(AXES, MORE, trained({"z": 4, "x": 4, "y": 4}, size=4, **more)) == {}


@distributed(world_size=[4], timeout=120, backend="shm")
@pytest.mark.slow
def test_micro_batches_over_z(world_size: int) -> None:
    """Micro-batches are pieces of z: with other numbers of them, too, bits are equal."""
    made = {}
    for accumulate, meshes in ((1, FEW), (2, FEW), (4, [(1, 1, 1), (1, 2, 2)])):
        run = trained({"z": 4, "x": 2, "y": 2}, size=4, accumulate=accumulate, dropout=0.1)

        def kept(mesh: DeviceMesh) -> Whole:
            values = run(mesh)  # noqa: B023
            if tuple(mesh.shape) == (1, 1, 1):
                made[accumulate] = values  # noqa: B023
            return values

        assert differing(AXES, meshes, kept) == {}
    if torch.distributed.get_rank() == 0:
        for name, value in made[1].items():
            assert torch.equal(value, made[2][name]), name
            assert torch.equal(value, made[4][name]), name


@distributed(world_size=[8], timeout=120, backend="shm")
def test_eight_ranks(world_size: int) -> None:
    meshes = [(1, 1, 1), (2, 2, 2), (4, 2, 1), (1, 2, 4), (2, 1, 4)]
    assert differing(AXES, meshes, trained({"z": 4, "x": 4, "y": 4}, size=4)) == {}


@pytest.mark.slow
@distributed(world_size=[2], timeout=120, backend="shm")
def test_without_pieces_of_an_axis_bits_differ(world_size: int) -> None:
    """So each of them is needed, and these sizes would show it."""
    for axis, mesh in (("z", (2, 1, 1)), ("x", (1, 2, 1)), ("y", (1, 1, 2))):
        others = {name: 2 for name in AXES if name != axis}
        assert mesh in differing(AXES, [(1, 1, 1), mesh], trained(others, steps=1)), axis
    with from_the_left():
        run = trained(dict.fromkeys(AXES, 4), size=4, steps=1)
        found = differing(AXES, [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], run)
    assert found.keys() == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


def unless(skipped: Callable[..., Any]) -> Callable[..., Any]:
    """`in_pieces`, but of one function, which is given the whole."""
    return lambda function, mesh, dims, *x: function(*x) if function is skipped else in_pieces(function, mesh, dims, *x)


@pytest.mark.slow
@distributed(world_size=[2], timeout=120, backend="shm")
def test_functions_of_joined_pieces_are_refused_and_differ(world_size: int) -> None:
    run = trained(dict.fromkeys(AXES, 2), d_ff=66)
    alone = DeviceMesh("cpu", torch.arange(2).view(2, 1, 1), mesh_dim_names=AXES)
    for function in (silu, grid._attend):
        with mock.patch.object(grid, "in_pieces", unless(function)), pytest.raises(LayoutError, match="comes from"):
            run(alone)
    with (
        mock.patch.object(grid, "in_pieces", unless(silu)),
        mock.patch.object(exact, "check_origin"),
    ):
        assert differing(AXES, [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], run)


@distributed(world_size=[2], timeout=120, backend="shm")
def test_as_on_one_device(world_size: int) -> None:
    """The loss, and every gradient; of micro-batches too."""
    sizes = {"layers": 2, "heads": 4, "d_model": 24, "seq_len": 6, "d_ff": 10}
    ids, targets = torch.randint(0, 8, (2, 4, 6), generator=torch.Generator().manual_seed(3))
    for shape, accumulate in (((2, 1, 1), 1), ((1, 2, 1), 1), ((1, 1, 2), 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=AXES)
        torch.manual_seed(1)
        model = Grid(**sizes, vocab=8, mesh=mesh, dtype=torch.float64)
        plain = build_reference(Model(kind="llama", **sizes), 8).double()
        plain.load(fill(model))
        sg.set_exact(mesh, 2)
        loss, expected = backward(model, ids, targets, accumulate), plain.loss(ids, targets)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
        for name, parameter, sharding in sg.named_shardings(model):
            right = plain.parameter_of(name).grad
            found = sharding.unshard(parameter.grad).view(right.shape)
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@distributed(world_size=[2], timeout=120, backend="shm")
def test_runs_leave_equal_checkpoints(world_size: int, tmp_path: Path) -> None:
    found = []
    for shape in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=AXES)
        name = "".join(map(str, shape))
        launched(
            mesh, load(written(tmp_path / f"{name}.yaml"), [f"mesh.grid={list(shape)}", f"run.dir={tmp_path / name}"])
        )
        found.append(checkpoint.digest(folder.checkpoints(tmp_path / name)[-1][1]))
    assert len(set(found)) == 1


CONFIG = """
mesh: {grid: [1, 1, 1]}
model: {kind: llama, layers: 1, heads: 4, d_model: 24, seq_len: 6, d_ff: 10}
train: {steps: 4, batch: 4, accumulate: 2, lr: 0.01, clip: 1.0, exact: {z: 4, x: 2, y: 2}}
sample: {tokens: 2}
"""


def written(path: Path) -> Path:
    text = path.with_suffix(".txt")
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    path.write_text(f"{CONFIG}data: {{files: [{text}]}}\n")
    return path


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.exact={dp: 2}", "train.exact names 'dp', which is no axis of the mesh: z, x, y"),
        ("model.heads=2", "model.heads = 2 does not divide into the 4 pieces that train.exact cuts y and x into"),
        ("model.seq_len=5", "model.seq_len = 5 does not divide into the 2 pieces that train.exact cuts x into"),
        ("model.d_model=28", "model.d_model = 28 does not divide into the 8 pieces that train.exact cuts x and z into"),
        ("model.d_ff=9", "model.d_ff = 9 does not divide into the 2 pieces that train.exact cuts y into"),
        ("train.batch=6", "train.batch = 6 does not divide into the 4 pieces that train.exact cuts z into"),
    ],
)
def test_sizes_that_pieces_do_not_divide_are_refused(tmp_path: Path, override: str, line: str) -> None:
    path = written(tmp_path / "small.yaml")
    load(path)
    assert f"  {line}" in refusal(load, path, override)


def test_one_number_is_for_all_axes(tmp_path: Path) -> None:
    config = load(written(tmp_path / "small.yaml"), ["train.exact=2"])
    assert pieces(config) == {"z": 2, "x": 2, "y": 2}
