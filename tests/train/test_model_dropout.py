"""Dropout in decoders: what is dropped is a function of the global element, of the call, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import whole
from test_resume import configured, go, kill_once, losses, own, same_bits
from tiny import SIZES, VOCAB, decoder, fill, reference, tokens
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.nn.counter import bits32
from shardgrad.nn.init import draw_seed
from shardgrad.testing import distributed
from shardgrad.train import data, folder
from shardgrad.train.config import Model, Train
from shardgrad.train.decoder import Decoder
from shardgrad.train.generate import generate
from shardgrad.train.grid import Grid
from shardgrad.train.loop import held_out_loss
from shardgrad.train.optimizer import make_optimizer
from shardgrad.train.reference import Reference, normed
from shardgrad.train.step import backward, train_step

P, BATCH = 0.3, 12
GRIDS = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(1, 3)], 4: [(2, 2)]}


def drop(x: Tensor) -> Tensor:
    """Dropout of a whole tensor [b,s,d] on one device, by its definition; draws a key as the sharded one does."""
    bits = bits32(draw_seed(), x.shape, (0, 0, 0), x.shape)
    return x * torch.from_numpy(bits >= round(P * 2**32)) / (1 - P)


def expected_loss(plain: Reference, ids: Tensor, targets: Tensor, accumulate: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for some, following in zip(ids.chunk(accumulate), targets.chunk(accumulate)):
        x = plain.embedding(some)
        x = drop(x if plain.positions is None else x + plain.positions.weight[: some.shape[1]])
        for block in plain.blocks:
            x = x + drop(block.attention(block.attention_norm(x)))
            x = x + drop(block.mlp(block.mlp_norm(x)))
        logits = plain.head(normed(plain.norm, x))
        total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten()) / accumulate
    return total


def check(model: Decoder, plain: Reference, accumulate: int) -> None:
    """The loss of two steps, the second with other masks, and its every gradient."""
    ids, targets = tokens(BATCH)
    torch.manual_seed(5)
    expected = [expected_loss(plain, ids, targets, accumulate) for _ in range(2)]
    expected[1].backward()
    torch.manual_seed(5)
    found = [backward(model, ids, targets, accumulate)]
    model.zero_grad()
    found.append(backward(model, ids, targets, accumulate))
    assert [loss.item() for loss in found] == pytest.approx([loss.item() for loss in expected], rel=1e-12)
    assert abs(found[0] - found[1]) > 1e-3
    assert abs(found[0] - plain.loss(ids, targets)) > 1e-3  # nothing dropped
    floor = 1e-14 * max(float(p.grad.norm()) for p in plain.parameters())
    for name, parameter, sharding in sg.named_shardings(model):
        right = plain.parameter_of(name).grad
        error = float((whole(parameter.grad, sharding).flatten() - right.flatten()).norm())
        assert error <= 1e-12 * float(right.norm()) + floor, f"{name}: {error} of {float(right.norm())}"


@distributed(world_size=[1, 2, 3, 4], backend="shm")
@pytest.mark.parametrize(
    ("kind", "accumulate", "recompute", "switches"),
    [
        ("gpt", 1, "none", {}),
        ("gpt", 3, "full", {"accumulate": True}),
        ("llama", 3, "attention", {"shard_params": True, "accumulate": True}),
    ],
)
def test_masks_are_those_of_the_global_tensor(
    world_size: int, kind: str, accumulate: int, recompute: str, switches: dict[str, bool]
) -> None:
    for grid in GRIDS[world_size]:
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=("dp", "tp"))
        data = sg.BatchAxis("dp", **switches)
        more: dict[str, Any] = {"kind": kind, "dropout": P}
        model, values = decoder(mesh, data=data, recompute=recompute, **more)
        check(model, reference(values, **more), accumulate)


@distributed(world_size=[2], backend="shm")
@pytest.mark.slow
def test_on_three_axes(world_size: int) -> None:
    for grid in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=("z", "x", "y"))
        torch.manual_seed(1)
        more: dict[str, Any] = {**SIZES, "d_model": 18, "d_ff": 7, "dropout": P}
        model = Grid(**more, vocab=VOCAB, mesh=mesh, dtype=torch.float64)
        check(model, reference(fill(model), kind="llama", **more), 1)


@distributed(world_size=[2], backend="shm")
def test_dropout_sends_nothing_once_keys_were_compared(world_size: int) -> None:
    sent = {}
    for p in (0.0, P):
        model, _ = decoder(init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp")), "gpt", dropout=p)
        ids, targets = tokens(BATCH)
        for _ in range(2):  # of five calls each: the eighth compares, the next is the sixteenth
            backward(model, ids, targets)
        with sg.trace_collectives() as traced:
            backward(model, ids, targets)
        sent[p] = traced.totals()
    assert sent[P] == sent[0.0]


@distributed(world_size=[1, 2], backend="shm")
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_the_curve_is_that_of_one_rank(world_size: int, kind: str) -> None:
    train = Train(steps=6, batch=BATCH, lr=0.01, warmup=1, clip=1.0)
    ids, targets = tokens(BATCH)
    mesh = init_device_mesh("cpu", (world_size, 1, 1), mesh_dim_names=("tp", "dp", "alone"))

    def curve(p: float, axis: str, data: sg.BatchAxis | None = None) -> list[float]:
        model, _ = decoder(mesh, kind, dropout=p, axis=axis, data=data)
        optimizer = make_optimizer(model, train)
        torch.manual_seed(5)
        return [train_step(model, optimizer, ids, targets, train).loss.item() for _ in range(train.steps)]

    alone = curve(P, "alone")
    assert curve(P, "tp") == pytest.approx(alone, rel=1e-10)
    assert curve(P, "alone", sg.BatchAxis("tp")) == pytest.approx(alone, rel=1e-10)
    assert curve(0.0, "alone")[0] != pytest.approx(alone[0], rel=1e-3)


@distributed(world_size=[1, 2])
def test_only_training_drops(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    (model, _), (plain, _) = (decoder(mesh, "gpt", dropout=p) for p in (0.9, 0.0))
    ids = (np.arange(60) ** 2 % VOCAB).astype(np.uint8)
    text = data.Text(ids, ids, VOCAB)
    before = torch.get_rng_state()
    assert held_out_loss(model, text, 2) == held_out_loss(plain, text, 2)
    assert generate(model, [1], 5, temperature=0.5, seed=1) == generate(plain, [1], 5, temperature=0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


DROPS = Model(layers=1, heads=3, d_model=12, seq_len=5, dropout=P)


@pytest.mark.slow
@distributed(world_size=[2], timeout=120)
@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_that_goes_on_drops_the_same(
    world_size: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp: int
) -> None:
    """On the same mesh the same bits; from another mesh, where the first step is compared once more, the same curve."""
    whole_run, parted = own(tmp_path, "whole"), own(tmp_path, "parted")
    go(configured(whole_run, model=DROPS), 2)
    with monkeypatch.context() as patched:
        if rank == 1:
            kill_once(patched, 3, 15)
        go(configured(parted, model=DROPS), tp)
    torch.rand(5)
    go(configured(parted, model=DROPS), 2)
    if tp == 2:
        same_bits(folder.checkpoint(whole_run / "run", 7), folder.checkpoint(parted / "run", 7))
    for one, other in zip(losses(whole_run / "run"), losses(parted / "run"), strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], rel=1e-5)
