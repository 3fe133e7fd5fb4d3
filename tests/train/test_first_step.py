"""The comparison with one device passes what is right and fails what is wrong."""

from __future__ import annotations

from math import nan

import pytest
import torch
from tiny import SEQUENCE, decoder, gpt, reference, tokens
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.layout.cost import totals
from shardgrad.nn import norm
from shardgrad.testing import distributed
from shardgrad.train.first_step import compare
from shardgrad.train.predict import step_collectives
from shardgrad.train.step import backward
from shardgrad.verification.gradients import FEW
from shardgrad.verification.rounding import RUNS


@distributed(world_size=[1, 2, 3, 4], backend="shm")
def test_rounding_passes(world_size: int) -> None:
    model, _ = gpt(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), torch.float32)
    ids, targets = tokens()
    loss = model.loss(ids, targets)
    loss.backward()
    found = compare(model, loss, ids, targets, reference)
    assert found.ok, found.table()
    assert found.runs == FEW
    assert {row.name for row in found.rows} == {"loss", *(name for name, _ in model.named_parameters())}
    assert 0 < max(row.score for row in found.rows) < 0.5


@distributed(world_size=[2, 3], backend="shm")
@pytest.mark.parametrize("planted", ["lost sum", "NaN", "doubled", "none", "one element"])
def test_mistakes_fail(world_size: int, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if planted == "lost sum":
        monkeypatch.setattr(norm, "row_pieces", lambda parameters, shardings, mesh, dims: [parameters])
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
    wrong = {row.name for row in found.rows if not row.ok}
    assert name in wrong
    assert planted == "lost sum" or wrong == {name}
    assert found[name].verdict == {"NaN": "not finite", "none": "missing"}.get(planted, "bug")
    assert found.rows[0].score > 10
    assert found.runs == RUNS
    explained = [fit.name for one in found.diagnoses for fit in one.fits]
    assert planted != "lost sum" or "sum over tp missing" in explained, explained


@distributed(world_size=[2, 4], backend="shm")
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_bfloat16_on_two_axes(world_size: int, kind: str) -> None:
    """Micro-batches, shards over dp, bfloat16: its rounding passes, a doubled gradient fails."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    data = sg.BatchAxis("dp", shard_params=kind == "llama", accumulate=True)
    model, _ = decoder(mesh, kind, torch.float32, data=data, compute_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ids, targets = tokens(4)
    for _ in range(2):
        model.zero_grad()
        with sg.trace_collectives() as traced:
            loss = backward(model, ids, targets, 2)
    assert totals(step_collectives(model, 4, SEQUENCE, accumulate=2)) == traced.totals()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    found = compare(model, loss, ids, targets, lambda: reference(kind=kind))
    assert found.ok, found.table()
    grad = model.get_parameter("head.weight").grad
    assert grad is not None
    grad.mul_(2)
    found = compare(model, loss, ids, targets, lambda: reference(kind=kind))
    assert [row.name for row in found.rows if not row.ok] == ["head.weight"]


@distributed(world_size=[2, 4], backend="shm")
def test_a_copy_that_is_wrong_on_one_rank(world_size: int) -> None:
    """What the first rank holds is right; the last rank's copy of a replicated gradient is not."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    model, _ = gpt(mesh, torch.float32, data=sg.BatchAxis("dp"))
    ids, targets = tokens(4)
    loss = backward(model, ids, targets)
    found = compare(model, loss, ids, targets, reference)
    assert found.ok, found.table()
    for name in ("norm.weight", "blocks.0.mlp.up.weight"):  # replicated over both axes; over dp, and sharded over tp
        parameter = model.get_parameter(name)
        right = parameter.grad.clone()
        if torch.distributed.get_rank() == world_size - 1:
            parameter.grad.view(-1)[0] += float(right.norm()) + 0.1
        found = compare(model, loss, ids, targets, reference)
        assert [(row.name, row.rank) for row in found.rows if not row.ok] == [(name, world_size - 1)]
        parameter.grad.copy_(right)
