"""shardgrad's own overlap on the late backend: nothing to report, right values, and planted races of it are found."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "train"))

import pytest
import torch
import torch.distributed as dist
from exact import assert_same, integers, reference
from launched import launched
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.comm.collectives import AllGather, Collective, ReduceScatter
from shardgrad.layout.layout import Layout
from shardgrad.layout.presets import PRESETS
from shardgrad.testing import distributed
from shardgrad.testing.late import Report, late_watch
from shardgrad.train.config import Config, Data, Mesh, Model, Run, Sample, Train

SIZES = {"e": 5, "n": 11, "d": 7, "m": 9, "k": 6}
MODES = ("plain", "deferred", "main_grad", "deferred main_grad")


def grid(layout: Layout, ranks: int, first: int) -> DeviceMesh:
    """All ranks along one of the layout's axes; four ranks along two where there are two."""
    shape = [1] * len(layout.axes)
    shape[first] = ranks
    if ranks == 4 and len(shape) > 1:
        shape[first] = shape[(first + 1) % len(shape)] = 2
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=layout.axes)


def check(layout: Layout, mesh: DeviceMesh, mode: str) -> None:
    """Y, dX, dW and db of two calls, of exact integers."""
    sizes = {letter: SIZES[letter] for letter in layout.letters}
    specs = (layout.lhs, layout.rhs, layout.bias, layout.out)
    full = [integers(spec, sizes, seed) for seed, spec in enumerate(specs)]
    x, w, b = (nn.Parameter(sg.shard(each, spec, mesh)) for each, spec in zip(full[:3], specs[:3]))
    dy = sg.shard(full[3], layout.out, mesh)
    buffers = sg.use_main_grads([w, b]) if "main_grad" in mode else []
    for _ in range(2):
        y = sg.matmul(x, w, layout, mesh, b, sizes)
        if "deferred" in mode:
            with sg.defer_weight_grads() as later:
                y.backward(dy)
            later.run()
        else:
            y.backward(dy)
    expected = reference(layout, *full[:3], full[3])
    found = {"dX": x.grad, "dW": buffers[0] if buffers else w.grad, "db": buffers[1] if buffers else b.grad}
    assert_same(y, layout.out, expected["Y"], mesh, sizes, f"Y, {mode}")
    for (name, grad), spec in zip(found.items(), specs):
        assert grad is not None
        assert_same(grad, spec, 2 * expected[name], mesh, sizes, f"{name}, {mode}")


@distributed(world_size=[2, 3], backend="late", timeout=120)
@pytest.mark.parametrize("name", PRESETS)
def test_layouts(world_size: int, name: str) -> None:
    """Every published layout, alone and with its collectives beside chunks of its products."""
    layout = PRESETS[name]
    mesh = grid(layout, world_size, 0)
    for chunks, mode in ((None, "plain"), (3, "deferred main_grad")):
        sg.set_overlap(mesh, chunks)
        check(layout, mesh, mode)


@pytest.mark.slow
@distributed(world_size=[2, 3, 4], backend="late", timeout=300)
@pytest.mark.parametrize("name", PRESETS)
def test_layouts_in_every_mode(world_size: int, name: str) -> None:
    layout = PRESETS[name]
    for first in range(len(layout.axes)):
        mesh = grid(layout, world_size, first)
        for chunks, mode in itertools.product((None, 1, 3), MODES):
            sg.set_overlap(mesh, chunks)
            check(layout, mesh, mode)


@distributed(world_size=[2, 3], backend="late")
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_layers(world_size: int, sequence_dim: int | None) -> None:
    """A block of layers, with and without sequence parallelism: gradients of all, none of them NaN."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    heads, sequence = 2 * world_size, 5
    axis = {"mesh": mesh, "sequence_dim": sequence_dim}
    layers = [sg.RMSNorm(8 * heads, **axis), sg.Attention(8 * heads, heads, **axis), sg.SwiGLU(8 * heads, 13, **axis)]
    sg.set_overlap(mesh, 2)
    x = torch.randn(2, sequence, 8 * heads)
    mine = x if sequence_dim is None else x.tensor_split(world_size, 1)[0]
    if sequence_dim is not None:
        mine = sg.slice_replicated(x, mesh, "tp", dim=1)
    mine = mine.requires_grad_()
    y = layers[0](mine)
    for layer in layers[1:]:
        y = y + (layer(y) if sequence_dim is None else layer(y, sequence))
    y.square().sum().backward()
    for parameter in itertools.chain(*(layer.parameters() for layer in layers), [mine]):
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


def watched(call: Callable[[], object]) -> Report:
    with late_watch(raises=False) as report:
        call()
    return report


def step(mesh: DeviceMesh, name: str, chunks: int | None) -> Callable[[], None]:
    """Forward and backward of a layout, whose gradients the program then reads."""
    layout = PRESETS[name]
    sizes = {letter: SIZES[letter] for letter in layout.letters}
    full = [integers(spec, sizes, at) for at, spec in enumerate((layout.lhs, layout.rhs, layout.out))]
    dy = sg.shard(full[2], layout.out, mesh)
    sg.set_overlap(mesh, chunks)

    def run() -> None:
        x, w = (nn.Parameter(sg.shard(each, spec, mesh)) for each, spec in zip(full, (layout.lhs, layout.rhs)))
        y = sg.matmul(x, w, layout, mesh, sizes=sizes)
        y.backward(dy)
        for each in (y, x.grad, w.grad):
            assert each is not None
            each.sum()

    run()
    return run


class Waits:
    """Counts the waits of shardgrad's collectives, and leaves one out; its work is kept: the reads must tell."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.left_out, self.kept = 0, -1, []  # type: ignore[var-annotated]
        self._real = Collective._await
        patch.setattr(Collective, "_await", lambda collective, work: self._await(collective, work))

    def _await(self, collective: Collective, work: Any) -> None:
        self.count += 1
        if self.count - 1 == self.left_out:
            self.kept.append(work)
        else:
            self._real(collective, work)

    def begin(self, left_out: int) -> None:
        with late_watch(raises=False):
            while self.kept:
                self.kept.pop().wait()
        self.count, self.left_out = 0, left_out


@distributed(world_size=[2, 3], backend="late", timeout=120)
@pytest.mark.parametrize(
    "name",
    [
        "data",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("column", "column_sequence", "row_sequence", "fully_sharded")
        ),
    ],
)
def test_every_wait_is_needed(world_size: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out one wait of a step after another: each is found, and named with both lines."""
    mesh = grid(PRESETS[name], world_size, 0)
    waits = Waits(monkeypatch)
    for chunks in (None, 2):
        run = step(mesh, name, chunks)
        waits.begin(-1)
        assert watched(run).findings == []
        total = waits.count
        for left_out in range(total):
            waits.begin(left_out)
            report = watched(run)
            assert {one.kind for one in report.findings} == {"read before wait"}, (left_out, chunks, str(report))
            assert all(one.started is not None and one.used is not None for one in report.findings)
        waits.begin(-1)


@distributed(world_size=[2, 3], backend="late")
@pytest.mark.parametrize("kind", [AllGather, ReduceScatter])
def test_a_buffer_that_is_used_again_too_early(
    world_size: int, kind: type[Collective], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a collective was given is overwritten between its start and its wait."""
    name = {AllGather: "column_sequence", ReduceScatter: "row_sequence"}[kind]
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=PRESETS[name].axes)
    run, real = step(mesh, name, None), kind.start

    def start(self: Any, x: Tensor) -> Any:
        handle = real(self, x)
        handle[2].data.neg_()
        return handle

    monkeypatch.setattr(kind, "start", start)
    report = watched(run)
    assert {one.kind for one in report.findings} == {"changed before wait"}
    assert "aten.neg_.default writes to what" in str(report)


@pytest.mark.slow
@distributed(world_size=[2, 3], backend="late", timeout=300)
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_the_training_program(world_size: int, fully_sharded: bool, tmp_path: Path) -> None:
    """A few steps as the launcher does them, in micro-batches, with checkpoints, over each axis of the mesh."""
    if dist.get_rank() == 0:  # which reads it first
        (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(600)))
    dist.barrier()
    for dp, tp in ((world_size, 1), (1, world_size)):
        config = Config(
            run=Run(dir=str(tmp_path / f"run{dp}"), seed=3),
            mesh=Mesh(dp=dp, tp=tp, fully_sharded=fully_sharded),
            model=Model(layers=1, heads=3, d_model=12, seq_len=5),
            data=Data(files=[str(tmp_path / "text.txt")], held_out=0.2),
            train=Train(steps=3, batch=12, accumulate=2, lr=0.01, warmup=1, log_every=1, eval_every=3, save_every=2),
            sample=Sample(prompt="li", tokens=3),
        )
        launched(init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp")), config)
