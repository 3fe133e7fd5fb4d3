"""Batches and results as people have them; what torch cannot differentiate; inputs from elsewhere."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hand import Hand, Single, rows, tp
from torch import Tensor, nn

import shardgrad as sg
from shardgrad.testing import distributed


class Batched(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **given: Any) -> dict[str, Tensor]:
        y = self.inner(given["x"])
        for extra in given.get("more", ()):
            y = y + extra["shift"]
        return {"logits": y, "loss": y.square().mean()}


@distributed(world_size=[2])
def test_batches_and_results_as_people_have_them(world_size: int) -> None:
    mesh = tp(world_size)
    shift = torch.randn(1, generator=torch.Generator().manual_seed(7))
    given = {"x": rows(), "more": [{"shift": shift, "name": "a"}]}
    for batch in (given, UserDict(given)):
        report = sg.verify(Batched(Hand(mesh)), Batched(Single()), batch, mesh)
        assert report.ok, report.table()
        kinds = {(row.kind, row.name) for row in report.rows}
        assert {("loss", "loss"), ("input gradient", "input x"), ("input gradient", "input more.0.shift")} <= kinds
    report = sg.verify(
        Hand(mesh), Single(), [UserDict({"x": rows()})], mesh, loss=lambda model, batch: model(batch["x"])
    )
    assert report.ok, report.table()
    assert ("input gradient", "input 0.x") in {(row.kind, row.name) for row in report.rows}


@distributed(world_size=[2])
def test_dims_in_another_order_are_told_not_reshaped(world_size: int) -> None:
    mesh = tp(world_size)
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))

    def turned(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.transpose(0, 1))

    with pytest.raises(sg.ShapeError, match=r"one of \(3, 4, 6\) does: its dims stand in another order"):
        sg.verify(Hand(mesh), Single(), x, mesh, loss=lambda m, x: m(x), parallel_loss=turned)
    report = sg.verify(
        Hand(mesh), Single(), x, mesh, loss=lambda m, x: m(x).square().mean(),
        parallel_loss=lambda m, x: turned(m, x).square().mean(),
    )  # fmt: skip
    assert report.ok, report.table()
    assert "its dims stand in another order than single's" in report.skipped["output of norm"]


@distributed(world_size=[2])
def test_inputs_that_do_not_come_from_the_batch(world_size: int) -> None:
    """They are the same in both steps; and nobody asks for their gradient."""
    mesh = tp(world_size)
    x = rows(count=6)
    mine = x.chunk(world_size)[dist.get_rank()]
    model = Single()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: sg.all_reduce(gradient.contiguous(), mesh, "tp"))
    report = sg.verify(
        model, Single(), x, mesh, loss=lambda m, x: m(x).square().mean(),
        parallel_loss=lambda m, x: m(mine.to(x.dtype)).square().mean() / world_size,
    )  # fmt: skip
    assert report.ok, report.table()
    assert report.skipped["input gradient of input 0"].startswith("parallel detaches it, or takes its inputs from")


@distributed(world_size=[2])
def test_what_torch_cannot_differentiate_or_clip(world_size: int) -> None:
    """Weights of classes in the batch; sparse gradients."""
    mesh = tp(world_size)
    generator = torch.Generator().manual_seed(4)
    batch = rows(), torch.randint(0, 6, (5,), generator=generator), torch.rand(6, generator=generator)
    report = sg.verify(
        Hand(mesh), Single(), batch, mesh, loss=lambda model, x, y, weights: F.cross_entropy(model(x), y, weights)
    )  # fmt: skip
    assert report.ok, report.table()
    assert "weight" in report.skipped["gradients of inputs"]
    ids = torch.randint(0, 9, (4, 3), generator=generator)
    for mistake in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 5))
        if mistake:
            model[0].weight.register_hook(lambda gradient: gradient * 2)
        single = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 5))
        report = sg.verify(model, single, ids, mesh, clip=lambda model, norm: torch.zeros(()))
        assert report.ok != mistake, report.table()
    assert report.first is not None
    assert (report.first.kind, report.first.name) == ("gradient", "0.weight")


@distributed(world_size=[2])
def test_a_model_in_float64_has_two_steps_in_its_own_precision(world_size: int) -> None:
    mesh = tp(world_size)
    x = rows(torch.float64)
    assert sg.verify(Hand(mesh, dtype=torch.float64), Single(), x, mesh).ok
    model = Hand(mesh, dtype=torch.float64)
    model.act.register_forward_hook(lambda module, inputs, output: output.float().double())
    report = sg.verify(model, Single(), x, mesh)
    assert not report.ok
    assert report.notes == ()
    assert report.first is not None
    assert report.first.name == "act"


@distributed(world_size=[2])
def test_complex_parameters_are_refused(world_size: int) -> None:
    model, single = (nn.ParameterDict({"c": torch.randn(3, dtype=torch.complex64)}) for _ in range(2))
    with pytest.raises(ValueError, match="c is complex, and only real numbers are compared"):
        sg.verify(model, single, rows(), tp(world_size))


class Scalar(nn.Module):
    """Returns its loss, and has one matrix."""

    def __init__(self, times: float = 1.0) -> None:
        super().__init__()
        self.weight, self.times = nn.Parameter(torch.ones(6, 4)), times

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).square().mean() * self.times


@distributed(world_size=[2])
def test_a_number_that_a_model_returns(world_size: int) -> None:
    report = sg.verify(Scalar(1.37), Scalar(), rows(), tp(world_size))
    assert report.first is not None
    assert (report.first.kind, report.first.name) == ("output", "(model)")


@distributed(world_size=[2, 3])
def test_ranks_with_different_batches_are_told_so_and_no_layer_is_accused(world_size: int) -> None:
    """Ranks that were not seeded alike: of real numbers, of ids, and in a mapping."""
    mesh = tp(world_size)
    generator = torch.Generator().manual_seed(dist.get_rank())
    other, ids = torch.randn(5, 6, generator=generator), torch.arange(5) + dist.get_rank()

    def loss(model: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        return model(x)[ids.new_zeros(())].square().mean()

    for batch, name in ((other, "0"), ((rows(), ids), "1"), ({"x": rows(), "ids": ids}, "ids")):
        with pytest.raises(sg.DisagreementError, match=f"different values in {name}: make it from one seed"):
            sg.verify(Hand(mesh), Single(), batch, mesh, loss=None if name == "0" else loss)
