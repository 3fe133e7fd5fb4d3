"""`verify_exact` accuses no right program of a single bit, and finds every planted bug."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_bugs import MUTANTS, PARTS, alter
from exact_programs import RIGHT, SEQUENCE_PARALLEL, Program, Trained, V, mesh_over
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.comm.collectives import AllReduce
from shardgrad.comm.mesh import view
from shardgrad.comm.pieces import exact
from shardgrad.comm.tree import TreeAllReduce, TreeReduceScatter
from shardgrad.testing import distributed
from shardgrad.train.llama import Llama
from shardgrad.verification.bits import apart

BUGS = {bug.name: bug for bug in MUTANTS}
FEW = (
    "the all-reduce of dX: dropped",
    "the all-reduce of db: a mean",
    "the reduce-scatter of Y: in bfloat16",
    "the all-gather of X: backwards",
    "every rank adds the bias",
    "a product that is not in pieces",
    "softmax over the rank's own vocabulary",
    "the last bit of one element of one rank",
    "clipped by the rank's own norm",
)
RIGHT_ONES: dict[str, Any] = {
    "plain": RIGHT,
    "sequence": SEQUENCE_PARALLEL,
    "tied": Program(tied=True),
    "GPT": Trained(dropout=0.1),
    "GPT tied": Trained(tied=True, kv_heads=8),
    "GPT in bfloat16": Trained(bf16=True, dropout=0.1),
    "GPT accumulated": Trained(micro=2, tied=True),
    "GPT with shards of parameters": Trained(shard_params=True, bf16=True),
    "GPT recomputed": Trained(recompute="full", dropout=0.1),
    "Llama": Trained(Llama),
    "Llama in bfloat16": Trained(Llama, bf16=True, tied=True),
    "Llama accumulated in bfloat16": Trained(Llama, bf16=True, micro=2),
}


def caught(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    bug = BUGS[name]
    with monkeypatch.context() as patches:
        if bug.patch is not None:
            bug.patch(patches)
        try:
            report = sg.verify_exact(bug.program.build, bug.program.step, mesh_over(bug.axis, ranks), V)
        except sg.LayoutError as error:  # exact mode refuses what the bug does between two layers, by hand
            return "exact mode: a tensor of shape" in str(error)
    return not report.ok


@distributed(world_size=[2])
def test_some_bugs_are_found(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name in FEW if not caught(name, world_size, monkeypatch)] == []


@distributed(world_size=[2])
def test_how_bugs_are_planted_is_no_bug(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, what in (
        (TreeAllReduce, PARTS),
        (TreeReduceScatter, "reduce-scatter of Y"),
        (AllReduce, "all-reduce of maxima"),
    ):
        alter(kind, what, lambda y, x, of: y)(monkeypatch)
    assert accused("sequence", "tp", world_size) == ""


def test_every_bug_can_be_planted() -> None:
    """What it alters in the library is still there."""
    for bug in MUTANTS:
        with pytest.MonkeyPatch.context() as patches:
            if bug.patch is not None:
                bug.patch(patches)


@pytest.mark.slow
@distributed(world_size=4, timeout=120.0)
@pytest.mark.parametrize("name", BUGS)
def test_every_bug_is_found(world_size: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert caught(name, world_size, monkeypatch) == (world_size >= BUGS[name].ranks)


def accused(name: str, axis: str, ranks: int) -> str:
    program = RIGHT_ONES[name]
    report = sg.verify_exact(program.build, program.step, mesh_over(axis, ranks), V, steps=2)
    assert report.steps == (2 if report.ok else report.differences[0].step)
    return "" if report.ok else f"{name}: {report}"


@pytest.mark.slow
@distributed(world_size=[2])
def test_some_right_programs_are_not_accused(world_size: int) -> None:
    assert accused("sequence", "tp", world_size) == ""
    assert accused("GPT in bfloat16", "dp", world_size) == ""
    assert accused("Llama accumulated in bfloat16", "tp", world_size) == ""


@distributed(world_size=[2])
def test_a_rank_with_one_piece_of_kv_heads_that_all_share(world_size: int) -> None:
    """Each rank's is a view of the parameter, which micro-batches must not take for the parameter itself."""
    program = Trained(Llama, kv_heads=1, micro=2)
    sg.verify_exact(program.build, program.step, mesh_over("tp", 2), {"tp": 2, "dp": 4}).require()


@pytest.mark.slow
@distributed(world_size=[2, 4], timeout=120.0)
@pytest.mark.parametrize("name", RIGHT_ONES)
def test_right_programs_are_not_accused(world_size: int, name: str) -> None:
    for axis in ("tp", "dp") if world_size == 2 else ("tp", "both"):
        assert accused(name, axis, world_size) == ""


class Pair(nn.Module):
    """A column and a row parallel layer, and a buffer."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.up = sg.ColumnParallelLinear(12, 16, mesh=mesh)
        self.down = sg.RowParallelLinear(16, 12, mesh=mesh)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x))
        return y


def tp_mesh(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))


def step(model: Pair, mesh: DeviceMesh) -> Tensor:
    model.zero_grad()
    loss = model(torch.randn(8, 12)).square().mean()
    loss.backward()
    model.seen += 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    return loss


def spoiled(how: Callable[[Any, DeviceMesh], object]) -> Callable[[Any, DeviceMesh], Tensor]:
    """The step, and then something that is done on several ranks only."""

    def spoiled_step(model: Any, mesh: DeviceMesh) -> Tensor:
        loss = step(model, mesh)
        if mesh.size() > 1:
            how(model, mesh)
        return loss

    return spoiled_step


@distributed(world_size=[1, 2])
def test_nothing_is_left_behind(world_size: int) -> None:
    mesh = tp_mesh(world_size)
    sg.set_exact(mesh, {"tp": 8})
    before = torch.get_rng_state()
    report = sg.verify_exact(Pair, step, mesh, {"tp": 4}, steps=3).require()
    assert str(report).startswith(f"all {4 + 1 + 4 + 4 + 1} tensors are the same bits after 3 steps")
    assert (report.first, report.pieces, report.steps) == (None, {"tp": 4}, 3)
    assert exact(view(mesh)) == {"tp": 8}
    assert torch.equal(torch.get_rng_state(), before)


@distributed(world_size=[2])
def test_what_differs_where_and_how_far(world_size: int) -> None:
    def one_bit(model: Pair, mesh: DeviceMesh) -> None:
        if view(mesh).coordinate["tp"] == 1:
            assert model.up.weight.grad is not None
            model.up.weight.grad.view(torch.int32)[2, 3] += 5
            model.up.weight.grad[4, 0].neg_()

    report = sg.verify_exact(Pair, spoiled(one_bit), tp_mesh(2), 4, steps=2)
    [found] = report.differences
    assert found is report.first
    assert (found.kind, found.name, found.step, found.elements) == ("gradient", "up.weight", 1, 2)
    assert (found.shape, found.dtype) == ((16, 12), "float32")
    [shard] = found.shards
    assert (shard.coordinate, shard.problem, shard.elements, shard.of) == ({"tp": 1}, "other bits", 2, 8 * 12)
    assert shard.index == (2, 3)
    assert shard.ulps > 1e9  # from one side of zero to the other
    with pytest.raises(sg.VerificationError, match=r"(?s)gradient of up.weight.*tp=1: 2 of 96 elements.*at \[2, 3\]"):
        report.require()


@distributed(world_size=[2])
def test_replicas_count_once(world_size: int) -> None:
    report = sg.verify_exact(Pair, spoiled(lambda model, _: model.down.bias.grad.mul_(2)), tp_mesh(2), 4)
    [found] = report.differences
    assert (found.name, found.elements, len(found.shards)) == ("down.bias", 12, 2)


def _no_gradient(model: Any, mesh: DeviceMesh) -> None:
    model.up.bias.grad = None


def _of_another_dtype(model: Any, mesh: DeviceMesh) -> None:
    model.seen = model.seen.double()


def _of_another_shape(model: Any, mesh: DeviceMesh) -> None:
    model.seen = model.seen[:2]


def _not_a_number(model: Any, mesh: DeviceMesh) -> None:
    model.seen[1] = float("nan")


def _sign_of_zero(model: Any, mesh: DeviceMesh) -> None:
    model.seen[1] = 0.0 if mesh.size() == 1 else -0.0


@distributed(world_size=[2])
def test_what_cannot_be_compared_is_reported(world_size: int) -> None:
    mesh = tp_mesh(2)
    for how, problem in {
        _no_gradient: "gradient of up.bias (float32[16] on one rank): missing",
        _of_another_dtype: "buffer of seen (float32[3] on one rank): another dtype",
        _not_a_number: "buffer of seen (float32[3] on one rank): other bits, 1 element, NaN on one side",
    }.items():
        report = sg.verify_exact(Pair, spoiled(how), mesh, 4)
        assert [str(one) for one in report.differences] == [problem]
        assert problem in str(report)
    report = sg.verify_exact(Pair, spoiled(_of_another_shape), mesh, 4)
    assert report.ok
    assert "not compared: buffer of seen (another shape" in str(report)

    def on_one_alone(model: Any, mesh: DeviceMesh) -> Tensor:
        loss = step(model, mesh)
        if mesh.size() == 1:
            model.up.bias.grad = None
        return loss

    report = sg.verify_exact(Pair, on_one_alone, mesh, 4)
    assert str(report.first) == "gradient of up.bias (no tensor on one rank): unexpected"

    def on_both(how: Callable[[Any, DeviceMesh], object]) -> Callable[[Any, DeviceMesh], Tensor]:
        def made(model: Any, mesh: DeviceMesh) -> Tensor:
            loss = step(model, mesh)
            how(model, mesh)
            return loss

        return made

    assert sg.verify_exact(Pair, on_both(_not_a_number), mesh, 4).ok  # the same bits
    report = sg.verify_exact(Pair, on_both(_sign_of_zero), mesh, 4)
    assert "other bits, 1 element, by the sign of a zero" in str(report.first)


@distributed(world_size=[2])
def test_what_cannot_be_done_raises_on_every_rank(world_size: int) -> None:
    mesh = tp_mesh(2)

    def fails_alone(model: Pair, mesh: DeviceMesh) -> Tensor:
        if mesh.size() == 1:
            raise ValueError("of one rank")
        return step(model, mesh)

    with pytest.raises(sg.VerificationError, match="one rank alone cannot do the step: ValueError: of one rank"):
        sg.verify_exact(Pair, fails_alone, mesh, 4)
    with pytest.raises(TypeError, match="step returns the loss, or numbers and tensors by name, not NoneType"):
        sg.verify_exact(Pair, lambda model, mesh: None, mesh, 4)  # type: ignore[arg-type, return-value]
    with pytest.raises(sg.MeshError, match="do not divide 3 pieces"):
        sg.verify_exact(Pair, step, mesh, {"tp": 3})
    with pytest.raises(ValueError, match="steps is at least 1"):
        sg.verify_exact(Pair, step, mesh, 4, steps=0)
    assert sg.verify_exact(Pair, step, mesh, 4).ok


@distributed(world_size=[2])
def test_a_part_of_a_mesh(world_size: int) -> None:
    """Of which each part has a first rank of its own."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "tp"))
    assert sg.verify_exact(Pair, step, mesh["tp"], 4).ok
    assert sg.verify_exact(Pair, step, mesh["other", "tp"], {"tp": 4}).ok


@distributed(world_size=[2])
def test_initial_values_are_compared_and_constants_disturbed(world_size: int) -> None:
    def build(mesh: DeviceMesh) -> Pair:
        model = Pair(mesh)
        with torch.no_grad():
            model.up.weight.fill_(view(mesh).coordinate["tp"])
            model.down.bias.zero_()
        return model

    report = sg.verify_exact(build, step, tp_mesh(2), 4)
    [found] = report.differences
    assert (found.kind, found.name, found.step, report.steps) == ("initial value", "up.weight", 0, 0)
    assert [shard.coordinate for shard in found.shards] == [{"tp": 1}]

    def zeros(mesh: DeviceMesh) -> Pair:
        model = Pair(mesh)
        torch.nn.init.zeros_(model.down.bias)
        return model

    def no_bias(model: Pair, mesh: DeviceMesh) -> Tensor:
        times = mesh.size() - 1.0  # every rank adds the bias
        loss = (model(torch.randn(8, 12)) + times * model.down.bias.detach()).square().mean()
        loss.backward()
        return loss

    assert sg.verify_exact(zeros, no_bias, tp_mesh(2), 4, perturb=False).ok
    assert not sg.verify_exact(zeros, no_bias, tp_mesh(2), 4).ok


def test_how_far_two_tensors_are_apart() -> None:
    one = torch.tensor([1.0, 0.0, -1.0])
    assert apart(one, one.clone()) is None
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([1.0, 2.0, -3.0], dtype=dtype)
        y = torch.nextafter(x, torch.tensor(torch.inf, dtype=dtype))
        found = apart(x, y)
        assert found is not None
        assert (found.elements, found.ulps, found.first) == (3, 1.0, 0)
    found = apart(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert found is not None
    assert (found.elements, found.ulps) == (1, 0.0)
    nan = torch.tensor([0.0, float("nan")])
    assert apart(nan, nan.clone()) is None
    found = apart(nan, torch.zeros(2))
    assert found is not None
    assert (found.elements, found.ulps, found.first) == (1, torch.inf, 1)
    tiny = torch.finfo(torch.float64).smallest_normal
    found = apart(torch.tensor([tiny], dtype=torch.float64), torch.tensor([-tiny], dtype=torch.float64))
    assert found is not None
    assert found.ulps == 2.0**53
    found = apart(torch.tensor([3, 4]), torch.tensor([3, 9]))
    assert found is not None
    assert (found.elements, found.ulps, found.first) == (1, 5.0, 1)
    assert apart(torch.zeros(0), torch.zeros(0)) is None


def test_there_are_as_many_bugs_as_the_page_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    assert len(BUGS) == len(MUTANTS)
    assert f"{len(MUTANTS)} bugs" in page
    assert f"the {sum(bug.ranks == 2 for bug in MUTANTS)} that two ranks can have" in page
