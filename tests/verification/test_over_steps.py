"""What is kept from one step to the next, drawn at random, or done by the optimizer, is explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hand import Hand, Single, rows, tp
from torch import Tensor, nn

import shardgrad as sg
from shardgrad.testing import distributed


def hooked(model: nn.Module, name: str, change: Any) -> nn.Module:
    model.get_parameter(name).register_hook(change)
    return model


@distributed(world_size=[2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_from_the_step_before_is_explained(world_size: int, dtype: torch.dtype) -> None:
    mesh = tp(world_size)

    def found(model: nn.Module, **more: Any) -> tuple[str, str, list[str]]:
        report = sg.verify(model, Single(), rows(dtype), mesh, **more)
        assert report.first is not None, report.table()
        return report.first.kind, report.first.name, [fit.name for one in report.diagnoses for fit in one.fits]

    sums: list[Tensor] = []

    def added(gradient: Tensor) -> Tensor:
        sums.append(gradient + (sums[-1].to(gradient) if sums else 0))
        return sums[-1]

    model = hooked(Hand(mesh, dtype=dtype), "up.weight", added)
    assert found(model) == ("gradient", "up.weight", ["added to that of the step before"])
    first: list[Tensor] = []

    def kept(gradient: Tensor) -> Tensor:
        first.append(gradient.clone())
        return first[0].to(gradient)

    model = hooked(Hand(mesh, dtype=dtype), "down.bias", kept)
    assert found(model) == ("gradient", "down.bias", ["kept from the step before"])
    model, weights = Hand(mesh, dtype=dtype), list[Tensor]()

    def cached(x: Tensor) -> Tensor:
        weights.append(model.up.weight.detach().clone())
        return F.linear(sg.replicate(x, mesh, "tp"), weights[0].to(x), model.up.bias) + 0 * model.up.weight.sum()

    model.up.forward = cached
    assert found(model)[1:] == ("up", ["parameter kept from the step before"])
    model = Hand(mesh, dtype=dtype)
    model.act.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    assert found(model)[1:] == ("act", ["drawn at random"])


@distributed(world_size=[2])
@pytest.mark.parametrize(("what", "explained"), [("momentum", "state of the optimizer"), ("eps", "another update")])
def test_what_an_optimizer_does_otherwise_is_explained(world_size: int, what: str, explained: str) -> None:
    mesh = tp(world_size)
    model = Hand(mesh)
    mine = {id(parameter) for parameter in model.parameters()}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        chosen = list(parameters)
        other = id(chosen[0]) in mine
        if what == "momentum":
            return torch.optim.SGD(chosen, lr=1e-2, momentum=0.9, dampening=0.5 if other else 0.0)
        return torch.optim.AdamW(chosen, lr=1e-2, eps=1e-3 if other else 1e-8)

    report = sg.verify(model, Single(), rows(), mesh, optimizer=optimizer)
    assert [fit.name for one in report.diagnoses for fit in one.fits] == [explained], report.table()
