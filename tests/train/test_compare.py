"""The comparison with one device passes what is right and fails what is wrong."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from tiny import gpt, reference, tokens
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.nn import norm
from shardgrad.testing import distributed
from shardgrad.train.compare import BOUND, Comparison, Row, compare


@distributed(world_size=[1, 2, 3, 4])
def test_rounding_passes(world_size: int) -> None:
    model, _ = gpt(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), torch.float32)
    ids, targets = tokens()
    loss = model.loss(ids, targets)
    loss.backward()
    found = compare(model, loss, ids, targets, reference)
    assert (found is None) == (torch.distributed.get_rank() > 0)
    if found is not None:
        assert found.passed, found.worst_first[0]
        assert found.rows[0].name == "loss"
        assert {row.name for row in found.rows[1:]} == {name for name, _ in model.named_parameters()}


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("planted", ["lost sum", "NaN", "doubled", "none", "one element"])
def test_mistakes_fail(world_size: int, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if planted == "lost sum":
        monkeypatch.setattr(norm, "replicate", lambda x, mesh, axis: x)
    model, _ = gpt(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), torch.float32)
    ids, targets = tokens()
    loss = model.loss(ids, targets)
    loss.backward()
    name = "blocks.1.mlp_norm.bias" if planted == "lost sum" else "blocks.1.mlp.down.weight"
    parameter = model.get_parameter(name)
    assert parameter.grad is not None
    if planted == "NaN":
        parameter.grad.view(-1)[0] = nan
    elif planted == "doubled":
        parameter.grad *= 2
    elif planted == "none":
        parameter.grad = None
    elif planted == "one element" and torch.distributed.get_rank() == world_size - 1:
        parameter.grad.view(-1)[0] *= 2
    found = compare(model, loss, ids, targets, reference)
    if found is not None:
        assert not found.passed
        failed = {row.name for row in found.rows if not row.ratio <= BOUND}
        assert name in failed
        assert planted == "lost sum" or failed == {name}
        assert found.worst_first[0].ratio > 10 * BOUND


@pytest.mark.parametrize("wrong", [nan, inf])
@pytest.mark.parametrize("where", ["error", "single", "norm"])
def test_what_is_not_finite_fails(where: str, wrong: float) -> None:
    fine = {"error": 1.0, "single": 1.0, "norm": 1.0}
    assert Comparison((Row("w", **fine, eps=1e-7),)).passed
    assert not Comparison((Row("w", **{**fine, where: wrong}, eps=1e-7),)).passed


def test_yardstick() -> None:
    assert Row("w", error=6.0, single=2.0, norm=1.0, eps=1e-7).ratio == 3
    assert Row("w", error=6.0, single=0.0, norm=2e7, eps=1e-7).ratio == pytest.approx(3)
    assert Row("w", error=0.0, single=0.0, norm=0.0, eps=1e-7).ratio == 0
    assert Row("w", error=1e-30, single=0.0, norm=0.0, eps=1e-7).ratio == inf
    rows = (Row("a", 1.0, 1.0, 1.0, 1e-7), Row("b", nan, 1.0, 1.0, 1e-7), Row("c", 3.0, 1.0, 1.0, 1e-7))
    assert [row.name for row in Comparison(rows).worst_first] == ["b", "c", "a"]
