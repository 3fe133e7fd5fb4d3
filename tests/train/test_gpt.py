"""The sharded GPT against the plain one in float64; what it sends against what was predicted."""

from __future__ import annotations

import pytest
import torch
from plain import whole
from tiny import BATCH, SEQUENCE, SIZES, VOCAB, gpt, reference, tokens
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.layout.cost import totals
from shardgrad.nn import norm
from shardgrad.testing import distributed
from shardgrad.train.generate import generate
from shardgrad.train.model import GPT
from shardgrad.train.predict import step_collectives


@distributed(world_size=[1, 2, 3, 4])
def test_loss_and_every_gradient_equal_one_device(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model, values = gpt(mesh)
    plain = reference(values)
    ids, targets = tokens()
    loss, expected = model.loss(ids, targets), plain.loss(ids, targets)
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-14 * expected.item() * 10
    grads = {name: plain.parameter_of(name).grad for name in values}
    norms = [grad.norm() for grad in grads.values() if grad is not None]
    # A tensor's rounding is some 1e-16 of the terms it is summed from; key biases are sums of terms that cancel.
    floor = 1e-15 * float(max(norms))
    for name, parameter, sharding in sg.named_shardings(model):
        right = grads[name]
        assert right is not None, name
        assert parameter.grad is not None, name
        error = float((whole(parameter.grad, sharding).flatten() - right.flatten()).norm())
        assert error <= 1e-12 * float(right.norm()) + floor, f"{name}: off by {error}, of {float(right.norm())}"


@distributed(world_size=[2, 3, 4])
@pytest.mark.parametrize("dropped", ["replicate", "slice_replicated"])
def test_a_lost_reduction_is_seen(world_size: int, dropped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above allows is far less than what a mistake does."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    if dropped == "replicate":  # the norms' gradients are no longer summed over the ranks
        monkeypatch.setattr(norm, "row_pieces", lambda parameters, shardings, mesh, dims: [parameters])
        affected = "blocks.0.mlp_norm.weight"
    else:  # a slice whose gradient stays on the rank that used it
        monkeypatch.setattr(
            "shardgrad.nn.positions.slice_replicated",
            lambda x, mesh, axis, dim: (
                x.chunk(mesh.size(), dim)[mesh.get_local_rank()]
                if mesh.get_local_rank() < len(x.chunk(mesh.size(), dim))
                else x[:0]
            ),
        )
        affected = "positions.weight"
    model, values = gpt(mesh)
    plain = reference(values)
    ids, targets = tokens()
    model.loss(ids, targets).backward()
    plain.loss(ids, targets).backward()
    found = model.get_parameter(affected).grad
    right = plain.parameter_of(affected).grad
    assert found is not None
    assert right is not None
    assert float((found - right).norm()) > 1e-3 * float(right.norm())


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_byte_was_predicted(world_size: int, dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model, _ = gpt(mesh, dtype)
    ids, targets = tokens()
    for _ in range(2):  # in the first pass, ranks also compare what they see for the first time
        with sg.trace_collectives() as traced:
            model.loss(ids, targets).backward()
    predicted = step_collectives(model, BATCH, SEQUENCE)
    assert totals(predicted) == traced.totals()
    assert sorted(c.bytes for c in predicted) == sorted(event.bytes for event in traced)
    assert bool(predicted) == (world_size > 1)


@distributed(world_size=[2, 3, 4])
def test_initial_values_are_those_of_one_rank(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("tp", "alone"))
    made = {}
    for axis in ("tp", "alone"):
        torch.manual_seed(4)
        made[axis] = GPT(**SIZES, vocab=VOCAB, mesh=mesh, axis=axis)
    for (name, parameter, sharding), alone in zip(
        sg.named_shardings(made["tp"]), made["alone"].parameters(), strict=True
    ):
        assert torch.equal(whole(parameter, sharding), alone), name
        if name.endswith("weight") and "norm" not in name:
            deviation = 0.02 / 2 if "output" in name or "down" in name else 0.02  # two layers: √(2·2) = 2
            assert alone.std().item() == pytest.approx(deviation, rel=0.5), name


@distributed(world_size=[2, 3])
def test_sample_is_that_of_one_rank(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("tp", "alone"))
    made = {}
    for axis in ("tp", "alone"):
        torch.manual_seed(4)
        made[axis] = GPT(**SIZES, vocab=VOCAB, mesh=mesh, axis=axis, dtype=torch.float64)
    texts = [generate(model, [3, 1], 20, temperature=0.01, seed=5) for model in made.values()]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 22
    assert texts[0][:2] == [3, 1]
    assert max(texts[0]) < VOCAB


@distributed(world_size=[2])
def test_ids_that_do_not_fit(world_size: int) -> None:
    model, _ = gpt(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)))
    with pytest.raises(sg.ShapeError, match=r"at most 6 positions \(seq_len\), got \(2, 7\)"):
        model(torch.zeros(2, 7, dtype=torch.int64))
