"""What two steps say together: a jump or another formula is not accused, and what one step hides is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hand import Hand, Single, rows, tp, wrong
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.testing import distributed


def no_float64(model: nn.Module, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise RuntimeError("no kernel for Double")
    return model(x)


class MLP(nn.Sequential):
    """x [n, 32] → [n, 32], two blocks with a ReLU each."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        layers: list[nn.Module] = []
        for _ in range(2):
            up = nn.Linear(32, 128) if mesh is None else sg.ColumnParallelLinear(32, 128, mesh=mesh)
            down = nn.Linear(128, 32) if mesh is None else sg.RowParallelLinear(128, 32, mesh=mesh)
            layers += [up, nn.ReLU(), down]
        super().__init__(*layers)


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_points_on_a_jump_are_not_accused_and_mistakes_beside_them_are(world_size: int, dtype: torch.dtype) -> None:
    mesh = tp(world_size)
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = MLP(mesh).to(dtype), torch.randn(128, 32).to(dtype)
        report = sg.verify(model, MLP().to(dtype), x, mesh, seed=seed)
        assert report.ok, report.table()
        unsure = report.with_verdict("cannot tell")
        assert not unsure or "'cannot tell': right in float64" in report.summary()
    model[0].bias.register_hook(lambda gradient: gradient * 1.004)  # less than one rounding of bfloat16
    report = sg.verify(model, MLP().to(dtype), x, mesh, seed=seed)
    assert report.first is not None
    assert (report.first.kind, report.first.name, report.first.in_float64) == ("gradient", "0.bias", True)
    assert {kind for kind, _ in wrong(report)} == {"gradient", "norm", "step"}, "clipping spreads it"


class Norm(nn.Module):
    """Means of squares less squares of means: as far off as it can be where the mean is large."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        mean, squares = x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
        return (x - mean) * torch.rsqrt(squares - mean.square() + 1e-5) * self.weight


@distributed(world_size=[2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [30.0, 3000.0])
def test_another_formula_is_not_accused(world_size: int, dtype: torch.dtype, mean: float) -> None:
    mesh = tp(world_size)
    torch.manual_seed(0)
    x = torch.randn(6, 24).to(dtype) + mean
    for theirs in (nn.LayerNorm(24, bias=False), Norm(24)):
        single = nn.Sequential(theirs, nn.Linear(24, 10))
        model = nn.Sequential(Norm(24), sg.ColumnParallelLinear(24, 10, mesh=mesh)).to(dtype)
        report = sg.verify(model, single.to(dtype), x, mesh)
        assert report.ok, report.table()


class Counted(nn.Module):
    """Running statistics, and a step that changes them."""

    def __init__(self, mistake: str = "") -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 5)
        self.mistake = mistake

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.norm(x))
        if self.mistake == "statistics" and dist.get_rank() == dist.get_world_size() - 1:
            self.norm.running_var.data.mul_(1.01)
        return y


@distributed(world_size=[2])
def test_buffers_after_the_step(world_size: int) -> None:
    mesh = tp(world_size)
    torch.manual_seed(0)
    for mistake in ("", "statistics"):
        model, single = Counted(mistake), Counted()
        model(rows(count=5))  # what has been counted before is parallel's
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        report = sg.verify(model, single, rows(count=5), mesh)
        assert {row.name for row in report.rows if row.kind == "buffer"} == {
            "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
        }  # fmt: skip
        assert wrong(report) == ({("buffer", "norm.running_var")} if mistake else set()), report.table()
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@distributed(world_size=[2])
@pytest.mark.parametrize("ranks", ["all", "last"])
def test_what_is_trained_on_one_side_alone(world_size: int, ranks: str) -> None:
    mesh = tp(world_size)
    model, single = Hand(mesh), Single()
    here = ranks == "all" or dist.get_rank() == world_size - 1
    model.norm.weight.requires_grad_(not here)
    report = sg.verify(model, single, rows(), mesh)
    assert report["norm.weight"].verdict == "frozen", report.table()
    assert report["norm.weight"].rank == (0 if ranks == "all" else 1)
    assert f"takes no gradient on rank {report['norm.weight'].rank}" in report.summary()
    assert [fit.name for fit in report.diagnoses[0].fits] == ["frozen"]
    single.norm.weight.requires_grad_(False)
    model.norm.weight.requires_grad_(here)
    report = sg.verify(model, single, rows(), mesh)
    assert report["norm.weight"].verdict == "trainable", report.table()
    model.norm.weight.requires_grad_(False)
    assert sg.verify(model, single, rows(), mesh).ok


@distributed(world_size=[2])
def test_shards_that_are_alike_would_hide_another_ranks(world_size: int) -> None:
    mesh = tp(world_size)

    def next_ranks(gathered: bool) -> nn.Module:
        model = Hand(mesh)
        for name, shape in (("up.weight", (4, 6)), ("up.bias", (4,)), ("down.weight", (6, 4))):
            half = torch.randn(shape, generator=torch.Generator().manual_seed(3))
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(half))
        if gathered:
            up = model.up

            def other(x: Tensor) -> Tensor:
                every = [torch.empty_like(up.weight) for _ in range(world_size)]
                dist.all_gather(every, up.weight.detach())
                weight = every[(dist.get_rank() + 1) % world_size]
                return F.linear(x, up.weight + (weight - up.weight).detach(), up.bias)

            up.forward = other
        return model

    single = Single()
    single.up, single.down = nn.Linear(6, 8), nn.Linear(8, 6)
    for gathered in (False, True):
        for dtype, loss in ((torch.float32, None), (torch.bfloat16, no_float64)):
            model, x = next_ranks(gathered).to(dtype), rows(dtype)
            splits = {"down.weight": "W[d,m/tp]"}
            report = sg.verify(model, single, x, mesh, splits=splits, loss=lambda m, x: m(x), parallel_loss=loss)
            assert report.ok != gathered, report.table()
            assert bool(report.notes) == (dtype == torch.bfloat16)
            assert report.ok or report.first.name == "up"


@distributed(world_size=[2])
def test_what_is_zero_is_not_judged(world_size: int) -> None:
    mesh = tp(world_size)
    report = sg.verify(
        Hand(mesh), Single(), rows(), mesh, loss=lambda m, x: m(x).sum() * 0, parallel_loss=lambda m, x: m(x).sum() * 0
    )
    assert not report.ok
    assert report.idle
    assert report.summary().startswith("cannot tell: every gradient is zero")

    def part(model: nn.Module, x: Tensor) -> Tensor:
        return (
            model.up(model.norm(x)).square().sum() + 0 * model(x).sum()
            if not isinstance(model, Hand)
            else (
                sg.all_reduce(model.up(sg.replicate(model.norm(x), mesh, "tp")).square().sum(), mesh, "tp")
                + 0 * model(x).sum()
            )
        )

    report = sg.verify(Hand(mesh), Single(), rows(), mesh, loss=part)
    assert report["down.weight"].verdict == "not judged"
    assert "zero everywhere, and so not judged" in report.summary()


@distributed(world_size=[2])
def test_stale_values_of_the_first_step(world_size: int) -> None:
    mesh = tp(world_size)
    model = Hand(mesh)
    kept: list[Tensor] = []
    up = model.up.forward

    def cached(x: Tensor) -> Tensor:
        kept.append(x.detach()) if not kept else None
        return up(x + (kept[0].to(x) - x).detach())

    model.up.forward = cached
    report = sg.verify(model, Single(), rows(), mesh)
    assert report.first is not None
    assert report.first.name == "up"
    assert report.first.in_float64
    model, given = Hand(mesh), list[Tensor]()

    def first_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        given.append(inputs[0].detach())
        return (inputs[0] + (given[0].to(inputs[0]) - inputs[0]).detach(),)

    model.norm.register_forward_pre_hook(first_input)
    report = sg.verify(model, Single(), rows(), mesh)
    assert report.first is not None, "the inputs are others too"
    assert report.first.name == "norm"


@distributed(world_size=[2])
def test_constants_of_an_optimizer_that_one_step_hides(world_size: int) -> None:
    mesh = tp(world_size)

    def report(**other: Any) -> sg.Report:
        model = Hand(mesh)
        mine = {id(parameter) for parameter in model.parameters()}

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            chosen = list(parameters)
            given = {"betas": (0.9, 0.99), **(other if id(chosen[0]) in mine else {})}
            return torch.optim.AdamW(chosen, lr=1e-2, **given)

        return sg.verify(model, Single(), rows(), mesh, optimizer=optimizer)

    assert report().ok
    found = report(betas=(0.9, 0.95))
    assert {kind for kind, _ in wrong(found)} == {"second step"}


@distributed(world_size=[2])
def test_a_program_that_cannot_run_in_float64(world_size: int) -> None:
    """Three steps in the working precision decide, and the report says why."""
    mesh = tp(world_size)

    torch.manual_seed(0)
    x = torch.randn(128, 32).bfloat16()
    model = MLP(mesh).bfloat16()
    report = sg.verify(model, MLP().bfloat16(), x, mesh, loss=lambda m, x: m(x), parallel_loss=no_float64)
    assert report.ok, report.table()
    assert report.notes == (
        "the second step was not in float64, as RuntimeError: no kernel for Double: "
        "what is wrong at one point alone is not told",
    )
    model[5].bias.register_hook(lambda gradient: gradient * 2)
    report = sg.verify(model, MLP().bfloat16(), x, mesh, loss=lambda m, x: m(x), parallel_loss=no_float64)
    assert {("gradient", "5.bias"), ("step", "5.bias")} <= wrong(report)
    assert report.first is not None
    assert (report.first.kind, report.first.name) == ("gradient", "5.bias")


@distributed(world_size=[2])
def test_a_cast_that_one_device_does_not_make(world_size: int) -> None:
    mesh = tp(world_size)
    model = Hand(mesh)
    model.up.register_forward_hook(lambda module, inputs, output: output.bfloat16().to(output.dtype))
    report = sg.verify(model, Single(), rows(), mesh)
    assert report.first is not None
    assert report.first.name == "up"

    def rounded(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).bfloat16().float().square().mean()

    assert sg.verify(Hand(mesh), Single(), rows(), mesh, loss=rounded).ok


@distributed(world_size=[2])
def test_what_the_user_skips(world_size: int) -> None:
    mesh = tp(world_size)
    model = Hand(mesh)
    model.act.register_forward_hook(lambda module, inputs, output: output.clone().mul_(2).div_(2).add_(0))
    report = sg.verify(model, Single(), rows(), mesh, skip=["act", "down.grad"])
    kinds = {(row.kind, row.name) for row in report.rows}
    assert not {("output", "act"), ("output gradient", "act"), ("output gradient", "down")} & kinds
    assert ("output", "down") in kinds
    assert report.skipped["output of act"] == "as was asked"
    with pytest.raises(sg.LayoutError, match="skip: nothing is called 'akt'; the nearest names are act"):
        sg.verify(model, Single(), rows(), mesh, skip=["akt"])


class Gated(nn.Module):
    """x [n, d] → [n, d]: gate and up are one product, whose rows are two parts."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.mesh, ranks = mesh, 1 if mesh is None else mesh.size()
        self.norm = nn.LayerNorm(6)
        self.both, self.down = nn.Linear(6, 24 // ranks, bias=False), nn.Linear(12 // ranks, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.mesh is None:
            gate, up = self.both(self.norm(x)).chunk(2, -1)
            return self.down(F.silu(gate) * up)
        whole = sg.all_gather(self.norm(x), self.mesh, "tp", dim=0, size=self.mesh.size() * len(x))
        gate, up = self.both(whole).chunk(2, -1)
        return sg.reduce_scatter(self.down(F.silu(gate) * up), self.mesh, "tp", dim=0)


@distributed(world_size=[2])
def test_what_megatrons_attributes_say_can_be_written(world_size: int) -> None:
    """A stride of two, as text; and gradients of norms that see a part of the sequence."""
    mesh = tp(world_size)
    x = rows(count=6)

    def report(splits: dict[str, str]) -> sg.Report:
        torch.manual_seed(dist.get_rank())
        model = Gated(mesh)
        for parameter in model.norm.parameters():
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
        part = x.chunk(world_size)[mesh.get_local_rank()]
        return sg.verify(model, Gated(), x, mesh, parallel_batch=part, splits=splits)

    found = report({"both.weight": "W[2*m/tp,d]", "both": "Y[n,2*m/tp]"})
    assert found.ok, found.table()
    assert found["both.weight"].split == "W[2*m/tp,d]"
    assert found["norm.weight"].split == "T[a]{tp}"
    assert {row.name for row in found.rows if row.kind == "step"} >= {"norm.weight", "both.weight"}
    assert not report({}).ok, "the parts of each rank are no chunk"
    with pytest.raises(sg.LayoutError, match="has dims of 2 and of 3 parts"):
        report({"both.weight": "W[2*m/tp,3*d]"})


class Masked(nn.Module):
    """x [n, d] → [n, d], with a mask of infinities, which a module gives, on scores of rows."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.inner, self.mask = Single() if mesh is None else Hand(mesh), nn.Threshold(0.0, -torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        scores = self.mask(torch.ones(len(x), len(x), dtype=x.dtype).tril() * 1e30)
        return torch.softmax(scores.clamp(max=0) + y @ y.t(), -1) @ y


@distributed(world_size=[2])
def test_large_numbers_elsewhere_hide_nothing(world_size: int) -> None:
    mesh, dtype = tp(world_size), torch.bfloat16
    for mistake in (False, True):
        model = Masked(mesh).to(dtype)
        if mistake:
            model.inner.up.register_forward_hook(lambda module, inputs, output: output * 1.002)
        report = sg.verify(model, Masked(), rows(dtype), mesh)
        assert report.ok != mistake, report.table()
    assert report.first is not None
    assert (report.first.name, report.first.in_float64) == ("inner.up", True)
